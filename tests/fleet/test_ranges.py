"""Large disks by ranges: into a shared file, an object in S3, an EBS snapshot; whoever dies meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws.disks import disk_file, holds, only_snapshot
from aws.fake import BLOCK, Fake, Serving
from clikit import dm
from fleet.kit import Cluster, ended, ledger_lines, plan, start, wait_for

from diskmorph.commands.fleet_words import rows_of
from diskmorph.convert.fleet import RunOptions, expand, read_plan
from diskmorph.convert.fleet.perform import perform
from diskmorph.convert.fleet.ranges import Split, abandon_split, write_range
from diskmorph.formats.errors import IntegrityError

from testkit import MIB, data, run

SIZE = 37 * MIB + 512
SCATTERED = [0, 1, 5, 9, 30, 31, 32, 66, 70]


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A qcow2 with data in and across the borders of ranges, and a hole at its end."""
    raw = tmp_path / "big.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        for at in (0, 4 * MIB - 100, 8 * MIB - 1, 15 * MIB, 31 * MIB + 7):
            file.seek(at)
            file.write(data(at, 70_000))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "big.qcow2")
    return raw


def test_an_object_by_parts(bucket: Any, big: Path, tmp_path: Path) -> None:
    path = plan(tmp_path, "big.qcow2", "s3://vms/big.raw")
    words = ("fleet", "run", path, "--json", "--split", "8M", "--part", "9M")
    (row,) = dm(*words).ok().json["results"]
    content = bucket.get_object(Bucket="vms", Key="big.raw")["Body"].read()
    assert content == big.read_bytes().ljust(-(-SIZE // 512) * 512, b"\0") and row["status"] == "done"
    assert row["ranges"] == 5, "parts of 8 MiB at the least"
    assert row["digest"] == dm("digest", big, "--json").ok().json["digest"]
    assert not bucket.list_multipart_uploads(Bucket="vms").get("Uploads")
    (row,) = dm(*words).ok().json["results"]
    assert row["status"] == "skipped"
    bucket.put_object(Bucket="vms", Key="other.raw", Body=b"a stranger's")
    whole = read_plan(str(plan(tmp_path, "big.qcow2", "s3://vms/other.raw")))
    (refused,) = rows_of(expand(whole), whole.folder)
    assert perform(refused, RunOptions("r", split=8 * MIB)).status == "failed"
    assert not bucket.list_multipart_uploads(Bucket="vms").get("Uploads")


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake()
    made.reset()
    serving = Serving(made)
    words = {"AWS_ENDPOINT_URL": serving.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    words |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    words |= {"XDG_STATE_HOME": str(tmp_path / "state"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    yield made
    made.faults.clear()
    serving.close()


@pytest.mark.parametrize("split", [(), ("--split", "16M", "--part", "8M")])
def test_a_snapshot(ec2: Fake, split: tuple[str, ...], tmp_path: Path) -> None:
    raw = disk_file(tmp_path / "d.raw", SCATTERED)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"verb": "aws upload", "source": "d.raw"}) + "\n")
    ec2.faults.add("500", "ebs:PutSnapshotBlock", times=2)
    (row,) = dm("fleet", "run", path, "--json", *split).ok().json["results"]
    found = only_snapshot(ec2)
    holds(found, raw)
    assert row["snapshot_id"] == found.id and row["status"] == "done"
    assert row["stored_size"] == len(SCATTERED) * BLOCK and row["ranges"] == (5 if split else None)
    assert row["digest"] == dm("digest", raw, "--json").ok().json["digest"]
    assert found.tags["diskmorph:state"] == "finished" and found.tags["diskmorph:job"] == row["token"]
    (row,) = dm("fleet", "run", path, "--json", *split).ok().json["results"]
    assert row["status"] == "skipped" and len(ec2.account.snapshots) == 1


def test_ranges_outlive_workers_and_scheduler(big: Path, tmp_path: Path, cluster: Cluster) -> None:
    path = plan(tmp_path, "big.qcow2", "out.raw", rate="4M")
    running = start(path, "--scheduler", cluster.url, "--split", "4M", "--part", "2M", "--json", "--progress", "json")
    ledger = path.with_name("plan.jsonl.ledger.jsonl")
    wait_for(lambda: bool(list(tmp_path.glob(".out.raw.*.part"))))
    cluster.kill_worker(0)
    cluster.kill_scheduler()
    assert not ended(ledger) and not (tmp_path / "out.raw").exists()
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, out + err
    (row,) = [line for line in ledger_lines(ledger) if "row" in line]
    assert row["status"] == "done" and row["ranges"] == 19
    assert (tmp_path / "out.raw").read_bytes()[:SIZE] == big.read_bytes()
    assert not list(tmp_path.glob(".out.raw*"))


def test_a_source_that_changes_ends_the_row(big: Path, tmp_path: Path) -> None:
    from diskmorph.commands.fleet_words import rows_of
    from diskmorph.convert.fleet import RunOptions, expand, read_plan
    from diskmorph.convert.fleet.perform import perform

    whole = read_plan(str(plan(tmp_path, "big.raw", "out.raw")))
    (row,) = rows_of(expand(whole), whole.folder)
    options = RunOptions("r", split=4 * MIB, part=2 * MIB)
    split = perform(row, options)
    assert isinstance(split, Split)
    write_range(row, options, split, 0, 2 * MIB)
    with big.open("r+b") as file:
        file.write(b"another")
    with pytest.raises(IntegrityError, match="changed"):
        write_range(row, options, split, 2 * MIB, 4 * MIB)
    abandon_split(row, split)
    assert not list(tmp_path.glob(".out.raw*"))
