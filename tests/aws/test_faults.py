"""What goes wrong at AWS: the result is identical content and no leak, or one line that names the action."""

import signal
from pathlib import Path

import pytest
from aws.disks import bootable, disk_file, holds, only_snapshot, wait
from aws.fake import Fake
from clikit import dm

from testkit import run

PUT = "ebs:PutSnapshotBlock"


@pytest.mark.parametrize(
    "rules",
    [
        [("throttle", PUT, 0.2)],
        [("500", "ebs:*", 0.1), ("503", "ebs:*", 0.1)],
        [("reset", "ebs:*", 0.1)],
        [("lost", "ebs:*", 0.1)],
        [("slow", PUT, 0.3)],
        [("bad-answer", PUT, 0.1), ("refuse-checksum", PUT, 0.1)],
        [("throttle", "ec2:*", 0.2), ("500", "ec2:*", 0.1), ("reset", "ec2:Describe*", 0.2)],
        [
            ("throttle", "*", 0.05),
            ("500", "*", 0.05),
            ("reset", "ebs:*", 0.03),
            ("lost", PUT, 0.03),
            ("bad-answer", PUT, 0.02),
        ],
    ],
    ids=lambda rules: "+".join(rule[0] for rule in rules),
)
def test_upload_survives(rules: list[tuple[str, str, float]], fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(0, 120, 2)))
    for kind, action, chance in rules:
        fake.faults.add(kind, action, chance=chance)
    dm("aws", "upload", raw, "--workers", "8").ok()
    assert set(fake.faults.struck) >= {rules[0][0]}
    holds(only_snapshot(fake), raw)


def test_unknown_at_first(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [0, 3])
    fake.account.unknown_seconds = 1.5
    dm("aws", "upload", raw).ok()
    holds(only_snapshot(fake), raw)
    assert (PUT, 404) in fake.calls


def test_expired_credentials_are_read_anew(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(12)))
    fake.faults.add("expired", PUT, after=4, times=3)
    dm("aws", "upload", raw, "--workers", "2").ok()
    holds(only_snapshot(fake), raw)
    fake.account.snapshots.clear()
    fake.faults.add("expired", PUT)
    done = dm("aws", "upload", raw)
    assert done.status == 1 and "new credentials" in done.err and not fake.account.snapshots


@pytest.mark.parametrize("action", ["StartSnapshot", "PutSnapshotBlock", "CompleteSnapshot"])
def test_a_lost_answer_makes_nothing_twice(action: str, fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [0, 1])
    fake.faults.add("lost", f"ebs:{action}", times=1)
    dm("aws", "upload", raw).ok()
    holds(only_snapshot(fake), raw)


def test_a_lost_answer_of_register_finds_its_image(fake: Fake, tmp_path: Path) -> None:
    fake.faults.add("lost", "ec2:RegisterImage", times=1, after=1)  # the first call is the dry run
    answer = dm("aws", "publish", bootable(tmp_path / "d.raw", "bios"), "--name", "once", "--json").ok().json
    assert list(fake.account.images) == [answer["image_id"]]


@pytest.mark.parametrize(
    "action", ["ebs:StartSnapshot", PUT, "ebs:CompleteSnapshot", "ec2:DescribeSnapshots", "ec2:CreateTags"]
)
def test_denied(action: str, fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(100)))
    fake.faults.add("deny", action)
    done = dm("aws", "upload", raw)
    (line,) = done.err.splitlines()
    assert done.status == 1 and line.startswith("diskmorph: ") and action in line
    assert not fake.account.snapshots
    if action == PUT:
        assert len([call for call in fake.calls if call[0] == PUT]) <= 64, "nothing denied is asked twice"
    if action != "ebs:StartSnapshot":
        assert "removed snapshot snap-" in line


def test_what_cannot_be_undone_is_named(fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", [0])
    fake.faults.add("deny", PUT)
    fake.faults.add("deny", "ec2:DeleteSnapshot")
    done = dm("aws", "upload", raw)
    left = only_snapshot(fake).id
    assert f"could not remove snapshot {left}" in done.err and "aws gc" in done.err
    fake.faults.clear()
    assert dm("aws", "gc", "--older-than", "0", "--json").ok().json["removed"][0]["id"] == left


def test_quota_is_not_repeated(fake: Fake, tmp_path: Path) -> None:
    fake.faults.add("quota", "ebs:StartSnapshot")
    done = dm("aws", "upload", disk_file(tmp_path / "d.raw", [0]))
    assert done.status == 1 and "quota" in done.err
    assert [call for call in fake.calls if call[0] == "ebs:StartSnapshot"] == [("ebs:StartSnapshot", 402)]


@pytest.mark.parametrize("kind", ["throttle", "500", "reset", "bad-answer"])
def test_download_survives(kind: str, fake: Fake, tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", list(range(0, 60, 2)), length=1 << 30)
    name = fake.account.seed({i: raw.read_bytes()[i << 19 : (i + 1) << 19] for i in range(0, 60, 2)})
    fake.faults.add(kind, "ebs:GetSnapshotBlock" if kind == "bad-answer" else "ebs:*", chance=0.15)
    dm("aws", "download", name, tmp_path / "out.qcow2").ok()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, tmp_path / "out.qcow2")
    assert fake.faults.struck[kind]


def test_download_renews_tokens(fake: Fake, tmp_path: Path) -> None:
    blocks = {i: bytes([i % 255 + 1]) * 524288 for i in range(150)}
    name = fake.account.seed(blocks)
    fake.account.token_seconds, fake.account.page = 2.0, 100
    fake.faults.add("slow", "ebs:GetSnapshotBlock", seconds=0.6)
    dm("aws", "download", name, tmp_path / "out.raw").ok()
    got = (tmp_path / "out.raw").read_bytes()
    assert all(got[i << 19 : (i + 1) << 19] == data for i, data in blocks.items())
    assert ("ebs:GetSnapshotBlock", 400) in fake.calls, "no token expired"


def test_a_failed_copy_undoes_the_image(fake: Fake, tmp_path: Path) -> None:
    raw = bootable(tmp_path / "d.raw", "uefi")
    fake.faults.add("deny", "ec2:CopyImage", after=1)
    done = dm("aws", "publish", raw, "--name", "wide", "--copy-to", "eu-west-1", "--copy-to", "ap-southeast-2")
    assert done.status == 1 and "ec2:CopyImage" in done.err and len(done.err.splitlines()) <= 1
    assert not fake.account.images and not fake.account.snapshots


@pytest.mark.parametrize(
    "action", ["ebs:CompleteSnapshot", "ec2:DescribeSnapshots", "ec2:RegisterImage", "ec2:CreateTags"]
)
def test_publish_goes_on_after_a_kill(action: str, fake: Fake, spawn, tmp_path: Path) -> None:
    """Killed while it waits for an answer of each step: the same command makes one snapshot and one image of it."""
    raw = bootable(tmp_path / "d.raw", "uefi")
    after = 1 if action == "ec2:RegisterImage" else 0  # the dry run goes before
    rule = fake.faults.add("hang", action, after=after)
    child = spawn("publish", raw, "--name", "one", "--yes")
    wait(lambda: fake.faults.struck["hang"] > 0)
    child.kill()
    child.communicate()
    fake.faults.clear()
    before = set(fake.account.snapshots)
    answer = dm("aws", "publish", raw, "--name", "one", "--json").ok().json
    assert before == {answer["snapshot_id"]} == set(fake.account.snapshots) and rule.kind == "hang"
    assert list(fake.account.images) == [answer["image_id"]] and answer["blocks"]["sent"] == 0
    holds(only_snapshot(fake), raw)


def test_interrupted_while_registering(fake: Fake, spawn, tmp_path: Path) -> None:
    """What an unanswered call may have made is found by its tag, and removed."""
    raw = bootable(tmp_path / "d.raw", "uefi")
    fake.faults.add("hang", "ec2:DescribeImages", after=3)  # made, and not heard to be available
    child = spawn("publish", raw, "--name", "one")
    wait(lambda: fake.faults.struck["hang"] > 0)
    assert len(fake.account.images) == 1
    fake.faults.rules.clear()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "removed image ami-" in err
    assert not fake.account.images and not fake.account.snapshots
