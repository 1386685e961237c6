"""Classifying faults, the shared rate, the journal, maps of blocks: without any server."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from diskmorph.convert.aws.blocks import BLOCK, HASH, tasks
from diskmorph.convert.aws.faults import (
    CHECKSUM,
    EXPIRED,
    LIMIT,
    MISSING,
    REFUSED,
    SERVER,
    THROTTLE,
    WrongChecksumError,
    error_of,
    fault_of,
)
from diskmorph.convert.aws.gc import parse_age
from diskmorph.convert.aws.job import parse_tags
from diskmorph.convert.aws.journal import Journal, load_map, merged, save_map
from diskmorph.convert.aws.rates import Rate, Stopped
from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import HOLE, ZERO

from testkit import data, pattern_disk


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def answer(status: int, code: str, message: str = "what", reason: str = "") -> Exception:
    from botocore.exceptions import ClientError

    said = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(said | ({"Reason": reason} if reason else {}), "Operation")


@pytest.mark.parametrize(
    ("error", "sort"),
    [
        (answer(400, "RequestThrottledException"), THROTTLE),
        (answer(503, "SlowDown"), THROTTLE),
        (answer(503, "RequestLimitExceeded"), THROTTLE),
        (answer(400, "ValidationException", reason="ACCOUNT_THROTTLED"), THROTTLE),
        (answer(400, "ConcurrentLimitExceededException"), LIMIT),
        (answer(402, "ServiceQuotaExceededException", reason="DEPENDENCY_SERVICE_QUOTA_EXCEEDED"), REFUSED),
        (answer(403, "AccessDeniedException"), REFUSED),
        (answer(404, "ResourceNotFoundException", reason="SNAPSHOT_NOT_FOUND"), MISSING),
        (answer(400, "InvalidSnapshot.NotFound"), MISSING),
        (answer(400, "ValidationException", "Checksum does not match"), CHECKSUM),
        (answer(400, "ValidationException", "The aggregate checksum does not match"), REFUSED),
        (answer(400, "ValidationException", "Failed to read block data"), SERVER),
        (answer(400, "ValidationException", reason="CONFLICTING_BLOCK_UPDATE"), SERVER),
        (answer(500, "InternalServerException"), SERVER),
        (answer(502, "BadGateway"), SERVER),
        (answer(501, "NotImplemented"), REFUSED),
        (answer(400, "ExpiredTokenException"), EXPIRED),
        (ConnectionResetError("reset"), SERVER),
        (WrongChecksumError("other"), CHECKSUM),
    ],
)
def test_faults_are_sorted(error: Exception, sort: str) -> None:
    assert fault_of(error).sort == sort


def test_errors_name_the_action() -> None:
    error = error_of("ebs:PutSnapshotBlock", fault_of(answer(403, "AccessDeniedException", "not authorized")))
    assert "ebs:PutSnapshotBlock" in str(error) and error.kind == "aws" and "docs/aws.md" in (error.hint or "")


def test_rate_falls_and_rises() -> None:
    rate = Rate(1000)
    begun = time.monotonic()
    for _ in range(300):
        rate.take()
        rate.accepted()
    assert time.monotonic() - begun > 0.2, "no more than the quota"
    for _ in range(20):
        rate.refused()
    low = rate.now
    assert 100 < low < 800, "refusals of one moment are one cut, below what was accepted"
    time.sleep(1.2)
    rate.take()
    assert rate.now > low


def test_rate_stops() -> None:
    rate, stop = Rate(1), threading.Event()
    rate.take()
    threading.Timer(0.1, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        for _ in range(5):
            rate.take(stop)
    assert time.monotonic() - begun < 2


def digest(seed: int) -> bytes:
    return data(seed, 32)


def test_journal_at_every_cut() -> None:
    """Wherever the file is cut off, what is read is a prefix of what was written, and writing goes on behind it."""
    journal = Journal({"a": 1})
    job = journal.job
    journal.note(snapshot="snap-1")
    for index in range(6):
        journal.block(index * 3, digest(index))
    journal.close()
    whole = journal.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole), first - 1, -1):
        journal.path.write_bytes(whole[:cut])
        again = Journal({"a": 1})
        rows = again.blocks()
        assert again.job == job
        assert rows["index"].tolist() == [index * 3 for index in range(len(rows))]
        assert all(row["sha256"].tobytes() == digest(number) for number, row in enumerate(rows))
        again.block(99, digest(9))
        assert again.all_blocks()["index"].tolist() == [*rows["index"].tolist(), 99]
        again.close()
    journal.path.write_bytes(whole[: first - 2])
    fresh = Journal({"a": 1})
    assert fresh.job != job and not len(fresh.blocks())
    fresh.close(remove=True)
    assert not fresh.path.exists()


def test_journal_takes_garbage_for_an_end() -> None:
    journal = Journal("k")
    journal.block(1, digest(1))
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"block": 2, "sha256": "AAAA"}\n\xff\xfe\n')
    again = Journal("k")
    assert again.blocks()["index"].tolist() == [1] and again.job == journal.job


def test_journal_is_one_command_at_a_time() -> None:
    one, two = Journal("same"), Journal("same")
    assert one.path != two.path and one.job != two.job
    one.block(1, digest(1))
    two.block(2, digest(2))
    assert one.all_blocks()["index"].tolist() == [1] and two.all_blocks()["index"].tolist() == [2]


def test_old_journals_are_forgotten() -> None:
    old = Journal("old")
    old.close()
    os.utime(old.path, (1e9, 1e9))
    Journal("new").close()
    assert not old.path.exists()


def rows(pairs: dict[int, bytes]) -> np.ndarray:
    out = np.zeros(len(pairs), HASH)
    out["index"] = sorted(pairs)
    out["sha256"] = [np.frombuffer(pairs[index], np.uint8) for index in sorted(pairs)]
    return out


def test_maps() -> None:
    below, own = rows({1: digest(1), 5: digest(5)}), rows({5: digest(55), 7: digest(7)})
    both = merged(below, own)
    assert both["index"].tolist() == [1, 5, 7] and both["sha256"][1].tobytes() == digest(55)
    save_map("us-east-1", "snap-1", both)
    kept = load_map("us-east-1", "snap-1")
    assert kept is not None and (kept == both).all()
    assert load_map("eu-west-1", "snap-1") is None


def test_tasks_tell_holes_from_zeroes() -> None:
    pieces: list = [(0, 10, b"x"), (2 * BLOCK, BLOCK, ZERO), (5 * BLOCK, BLOCK, HOLE), (7 * BLOCK - 1, 2, b"y")]
    disk = pattern_disk(9 * BLOCK + 100, pieces)

    def shown(**words: object) -> list[tuple[int, int, bool]]:
        found = list(tasks(disk, **words))
        assert [task.first for task in found] == sorted(task.first for task in found)
        return [(index, 1, task.rows is None) for task in found for index in range(task.first, task.stop)]

    assert shown(zeroes=False) == [(0, 1, False), (6, 1, False), (7, 1, False)]
    assert shown(zeroes=True) == [(0, 1, False), (2, 1, True), (6, 1, False), (7, 1, False)]
    below = rows({2: digest(0), 5: digest(0), 6: digest(0), 12: digest(0)})
    assert [row[0] for row in shown(zeroes=False, below=below)] == [0, 2, 5, 6, 7, 12]


def test_words() -> None:
    assert [parse_age(text) for text in ("0", "1", "12h", "3d", "90s", "1.5h")] == [0, 86400, 43200, 259200, 90, 5400]
    assert parse_tags(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for bad in ("yesterday", "-1", ""):
        with pytest.raises(OptionError):
            parse_age(bad)
    for bad in ("noequals", "=x", "aws:a=1", "diskmorph:job=1"):
        with pytest.raises(OptionError):
            parse_tags([bad])
