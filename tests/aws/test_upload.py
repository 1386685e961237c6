"""Upload: what is sent, what is not, and that the same command goes on after a kill."""

import json
import random
import signal
from pathlib import Path

import pytest
from aws.disks import content, disk_file, holds, only_snapshot, wait
from aws.fake import BLOCK, Fake
from clikit import dm

from testkit import MIB, run

SCATTERED = [0, 1, 5, 9, 30, 31, 32, 77, 80]


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "stream", "deflate"])
def test_any_format(form: str, fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", SCATTERED)
    words = {
        "stream": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
        "deflate": ["-O", "qcow2", "-c", "-o", "cluster_size=2M"],
    }
    source = tmp_path / f"d.{form}"
    if form != "raw":
        run("qemu-img", "convert", "-f", "raw", *words.get(form, ["-O", form]), raw, source)
    answer = dm("aws", "upload", source, "--json").ok().json
    found = only_snapshot(fake)
    holds(found, raw)
    assert answer["snapshot_id"] == found.id and answer["volume_size"] == 1 and answer["encrypted"] is False
    total = 82 if form == "vpc" else 81  # its geometry rounds up
    assert answer["blocks"] == {"total": total, "sent": 9, "omitted": total - 9, "resumed": 0}
    assert found.tags["diskmorph:job"] == answer["job"] and found.tags["diskmorph:state"] == "finished"
    puts = [call for call in fake.calls if call[0] == "ebs:PutSnapshotBlock"]
    assert len(puts) == 9, "each block is sent once"


def test_a_container_image_is_built_on_the_way(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/hostname").write_text("fresh\n" * 1000)
    run("bsdtar", "-c", "-f", tmp_path / "app.tar", "-C", tmp_path / "root", ".")
    answer = dm("aws", "upload", tmp_path / "app.tar", "--boot", "none", "--size", "64M", "--json").ok().json
    volume = only_snapshot(fake).volume()
    (tmp_path / "out.raw").write_bytes(volume[: 64 * MIB])
    assert b"fresh\nfresh\n" in volume and answer["blocks"]["sent"] > 0
    assert "out.raw1" in run("sfdisk", "-d", tmp_path / "out.raw").stdout


def zeroed(path: Path) -> Path:
    """A qcow2: data in block 0, written zeroes in 4 and 5, the rest never allocated."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    run("qemu-io", "-c", "write -P 7 0 64k", "-c", "write -z 2M 1M", path)
    return path


@pytest.mark.parametrize(
    ("words", "default", "denied", "sent"),
    [
        ([], False, False, [0]),
        ([], True, False, [0, 4, 5]),
        ([], True, True, [0, 4, 5]),
        (["--encrypt"], False, False, [0, 4, 5]),
        (["--encrypt", "--zero", "omit"], False, False, [0]),
        (["--zero", "send"], False, False, [0, 4, 5]),
    ],
)
def test_zero_rule(words: list[str], default: bool, denied: bool, sent: list[int], fake: Fake, tmp_path: Path) -> None:
    fake.account.encrypts_by_default = default
    if denied:
        fake.faults.add("deny", "ec2:GetEbsEncryptionByDefault")
    answer = dm("aws", "upload", zeroed(tmp_path / "z.qcow2"), *words, "--json").ok().json
    found = only_snapshot(fake)
    assert sorted(found.own) == sent and answer["encrypted"] is (default or "--encrypt" in words)
    if "omit" not in words and found.encrypted:
        assert found.volume()[2 * MIB : 3 * MIB] == bytes(MIB), "what the disk wrote as zeroes reads as zeroes"


@pytest.mark.parametrize("mapped", [True, False])
def test_parent(mapped: bool, fake: Fake, tmp_path: Path) -> None:
    """Only differences are sent; a block that is gone is sent as zeroes. Also where no map of the parent is kept."""
    old = disk_file(tmp_path / "old.raw", SCATTERED)
    first = dm("aws", "upload", old, "--json").ok().json["snapshot_id"]
    if not mapped:
        for path in (tmp_path / "state").rglob("*.npy"):
            path.unlink()
    new = disk_file(tmp_path / "new.raw", [i for i in SCATTERED if i != 30] + [50], length=old.stat().st_size)
    answer = dm("aws", "upload", new, "--parent", first, "--json").ok().json
    found = fake.account.snapshots[answer["snapshot_id"]]
    assert found.below is not None and found.below.id == first
    assert found.volume()[: new.stat().st_size] == new.read_bytes()
    if mapped:
        assert sorted(found.own) == [30, 50]
    third = dm("aws", "upload", old, "--parent", answer["snapshot_id"], "--json").ok().json
    assert fake.account.snapshots[third["snapshot_id"]].volume()[: old.stat().st_size] == old.read_bytes()
    if mapped:
        assert third["blocks"]["sent"] == 2, "the map of a child holds its parent's blocks too"


def test_resume_after_kills_at_random_points(fake: Fake, spawn, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(60)))
    chance = random.Random(4)
    fake.faults.add("slow", "ebs:PutSnapshotBlock", seconds=0.05)
    ids, marks = set(), sorted(chance.sample(range(5, 50), 3))
    for mark in marks:
        child = spawn("upload", raw, "--workers", 4)
        wait(lambda mark=mark, child=child: child.poll() is not None or len(blocks(fake)) >= mark)
        child.kill()
        child.communicate()
        ids |= set(fake.account.snapshots)
        if chance.random() < 0.5:
            (journal,) = (tmp_path / "state").rglob("*.jsonl")
            with journal.open("r+b") as file:
                file.truncate(journal.stat().st_size - chance.randrange(1, 40))
    sent = len([call for call in fake.calls if call == ("ebs:PutSnapshotBlock", 201)])
    answer = dm("aws", "upload", raw, "--workers", 4, "--json").ok().json
    holds(only_snapshot(fake), raw)
    assert ids == {answer["snapshot_id"]}, "one snapshot, whatever happened"
    assert answer["blocks"]["resumed"] >= marks[-1] - 8
    again = len([call for call in fake.calls if call == ("ebs:PutSnapshotBlock", 201)])
    assert again <= 60 + 4 * 6, f"{again - 60} blocks were sent again"
    assert sent and not list((tmp_path / "state").rglob("*.jsonl"))


def blocks(fake: Fake) -> dict[int, bytes]:
    return next((dict(s.own) for s in fake.account.snapshots.values()), {})


def test_a_changed_source_is_not_mixed(fake: Fake, spawn, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(40)))
    fake.faults.add("hang", "ebs:PutSnapshotBlock", after=20)
    child = spawn("upload", raw)
    wait(lambda: len(blocks(fake)) >= 20)
    child.kill()
    child.communicate()
    fake.faults.clear()
    disk_file(raw, list(range(40)), seed=100)
    done = dm("aws", "upload", raw).ok()
    holds(only_snapshot(fake), raw)
    assert "changed" in done.err


def test_interrupted_and_kept(fake: Fake, spawn, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(40)))
    for words, number in (([], signal.SIGINT), ([], signal.SIGTERM), (["--keep-on-failure"], signal.SIGINT)):
        fake.faults.add("hang", "ebs:PutSnapshotBlock", after=10)
        child = spawn("upload", raw, *words)
        wait(lambda: len(blocks(fake)) >= 10)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert child.returncode == (130 if number == signal.SIGINT else 143)
        fake.faults.clear()
        if words:
            assert f"kept snapshot {only_snapshot(fake).id}" in err
        else:
            assert not fake.account.snapshots and "removed snapshot snap-" in err
    assert dm("aws", "upload", raw, "--keep-on-failure", "--json").ok().json["blocks"]["resumed"] >= 9
    holds(only_snapshot(fake), raw)


def test_progress_in_bytes(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", SCATTERED)
    rows = [json.loads(line) for line in dm("aws", "upload", raw, "--progress", "json").ok().err.splitlines()]
    upload = [row for row in rows if row["phase"] == "upload"]
    assert upload[-1]["done"] == upload[-1]["total"] == raw.stat().st_size


def test_bad_words(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [0])
    for words in (
        ["--kms-key", "arn:aws:kms:us-east-1:210987654321:key/1"],
        ["--parent", "snap-1", "--encrypt"],
        ["--workers", "0"],
        ["--max-rps", "-1"],
        ["--tag", "novalue"],
        ["--tag", "aws:x=1"],
    ):
        assert dm("aws", "upload", raw, *words).status == 2, words
    assert not fake.account.snapshots
    assert content(raw) and BLOCK == 524288
