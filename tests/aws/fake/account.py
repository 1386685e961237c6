"""The fake account: snapshots, images and import tasks, with the rules that AWS holds callers to."""

from __future__ import annotations

import base64
import hashlib
import itertools
import random
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

BLOCK = 512 << 10
OWNER = "210987654321"
NAME = re.compile(r"[A-Za-z0-9()\[\] ./\-'@_]{3,128}")


class No(Exception):
    """A refusal: HTTP status, error code, message, and the Reason that EBS direct adds."""

    def __init__(self, status: int, code: str, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.reason = status, code, message, reason


def invalid(message: str, reason: str = "INVALID_PARAMETER_VALUE") -> No:
    """EBS direct's 400."""
    return No(400, "ValidationException", message, reason)


@dataclass
class Snapshot:
    """Blocks by index; `below` is the parent, whose blocks show through; `gone` are indexes that do not."""

    id: str
    region: str
    gib: int
    started: float
    state: str = "pending"
    encrypted: bool = False
    key: str | None = None
    below: Snapshot | None = None
    tags: dict[str, str] = field(default_factory=dict)
    own: dict[int, bytes] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    settled: bool = False  # completion was asked for
    description: str = ""

    def content(self) -> dict[int, bytes]:
        """All blocks, the parents' too."""
        seen = self.below.content() if self.below else {}
        return {index: data for index, data in {**seen, **self.own}.items() if index not in self.gone}

    def family(self) -> set[str]:
        """Ids of the snapshot and its parents."""
        return {self.id} | (self.below.family() if self.below else set())

    def volume(self) -> bytes:
        """What a volume made of it reads: zeroes, or noise where it is encrypted, in blocks that it lacks."""
        have, noise = self.content(), random.Random(self.id)
        empty = bytes(BLOCK)
        blocks = (have.get(i) or (noise.randbytes(BLOCK) if self.encrypted else empty) for i in range(self.gib << 11))
        return b"".join(blocks)


class Account:
    """State and rules. `pending_seconds`: how long completing, registering and copying take."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.snapshots: dict[str, Snapshot] = {}
        self.images: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.answers: dict[tuple[str, ...], tuple[Any, Any]] = {}  # by client token
        self.encrypts_by_default = False
        self.pending_seconds = 0.05
        self.unknown_seconds = 0.0
        self.page = 1000
        self.token_seconds = 3600.0
        self.task_message: str | None = None
        self._numbers = itertools.count(1)
        self._ready: dict[str, float] = {}

    def new_id(self, prefix: str) -> str:
        """Return an id as AWS makes them: 17 hex digits."""
        return f"{prefix}-{next(self._numbers):04x}{secrets.token_hex(7)[:13]}"

    def once(self, token: str | None, asked: Any, make: Any, *scope: str) -> Any:
        """Idempotency: the same token gets the first answer; with other words it is a conflict."""
        if not token:
            return make()
        key = (*scope, token)
        if key not in self.answers:
            self.answers[key] = (asked, make())
        before, answer = self.answers[key]
        if before != asked:
            raise No(409, "ConflictException", "the client token was used for another request")
        return answer

    def ready(self, id: str, seconds: float | None = None) -> bool:
        """Whether the time that a thing takes is over."""
        return time.monotonic() >= self._ready.setdefault(
            id, time.monotonic() + (self.pending_seconds if seconds is None else seconds)
        )

    # --- snapshots

    def find(self, id: str, region: str) -> Snapshot:
        """Return a snapshot, or refuse as EBS direct does; young ones are unknown for a while."""
        found = self.snapshots.get(id)
        young = found is not None and time.time() - found.started < self.unknown_seconds
        if found is None or young or found.region != region:
            raise No(404, "ResourceNotFoundException", f"The snapshot '{id}' does not exist.", "SNAPSHOT_NOT_FOUND")
        if found.settled and found.state == "pending" and self.ready(id):
            found.state = "completed"
        return found

    def start(self, region: str, asked: dict[str, Any]) -> dict[str, Any]:
        gib = asked.get("VolumeSize")
        if not isinstance(gib, int) or not 0 < gib <= 65536:
            raise invalid("VolumeSize must be between 1 and 65536", "INVALID_VOLUME_SIZE")
        if not 10 <= asked.get("Timeout", 60) <= 4320:
            raise invalid("Timeout must be between 10 and 4320")
        below = None
        if "ParentSnapshotId" in asked:
            if "Encrypted" in asked or "KmsKeyArn" in asked:
                raise invalid("a parent's encryption is inherited")
            below = self.complete_one(asked["ParentSnapshotId"], region)
            if below.gib > gib:
                raise invalid("the volume is smaller than the parent's", "INVALID_VOLUME_SIZE")
        if "KmsKeyArn" in asked and not asked.get("Encrypted"):
            raise invalid("KmsKeyArn without Encrypted")
        tags = {tag["Key"]: tag.get("Value", "") for tag in asked.get("Tags", [])}
        if len(tags) != len(asked.get("Tags", [])) or any(key.lower().startswith("aws:") for key in tags):
            raise invalid("tags are not valid", "INVALID_TAG")
        encrypted = bool(asked.get("Encrypted") or self.encrypts_by_default or (below and below.encrypted))
        made = Snapshot(self.new_id("snap"), region, gib, time.time(), encrypted=encrypted, below=below, tags=tags)
        made.key = asked.get("KmsKeyArn") or (f"arn:aws:kms:{region}:{OWNER}:key/default" if encrypted else None)
        self.snapshots[made.id] = made
        answer = {"SnapshotId": made.id, "Status": "pending", "StartTime": made.started, "VolumeSize": gib,
                  "BlockSize": BLOCK, "OwnerId": OWNER, "SseType": "sse-kms" if encrypted else "none"}  # fmt: skip
        return answer | ({"KmsKeyArn": made.key} if encrypted else {})

    def complete_one(self, id: str, region: str) -> Snapshot:
        """Return a snapshot that may be read."""
        found = self.find(id, region)
        if found.state != "completed":
            raise invalid(f"The snapshot {id} is {found.state}, not completed", "INVALID_SNAPSHOT_ID")
        return found

    def writable(self, id: str, region: str) -> Snapshot:
        found = self.find(id, region)
        if found.state != "pending" or found.settled:
            raise invalid(f"The snapshot {id} is not pending", "INVALID_SNAPSHOT_ID")
        return found

    def put(self, region: str, id: str, index: int, data: bytes, head: dict[str, str]) -> str:
        found = self.writable(id, region)
        if len(data) != BLOCK or head.get("x-amz-data-length") != str(BLOCK):
            raise invalid("DataLength must be 524288")
        if head.get("x-amz-checksum-algorithm") != "SHA256":
            raise invalid("ChecksumAlgorithm must be SHA256")
        if index >= found.gib << 11:
            raise invalid("BlockIndex lies beyond the volume", "INVALID_BLOCK")
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        if head.get("x-amz-checksum") != checksum:
            raise invalid("The checksum is not that of the data")
        found.own[index] = data
        return checksum

    def complete(self, region: str, id: str, head: dict[str, str]) -> dict[str, Any]:
        found = self.find(id, region)
        if not found.settled and found.state != "pending":
            raise invalid(f"The snapshot {id} is not pending", "INVALID_SNAPSHOT_ID")
        if head.get("x-amz-changedblockscount") != str(len(found.own)):
            raise invalid(f"ChangedBlocksCount must be {len(found.own)}")
        if "x-amz-checksum" in head:
            if head.get("x-amz-checksum-aggregation-method") != "LINEAR":
                raise invalid("ChecksumAggregationMethod must be LINEAR")
            state = hashlib.sha256()
            for _, data in sorted(found.own.items()):
                state.update(hashlib.sha256(data).digest())
            if head["x-amz-checksum"] != base64.b64encode(state.digest()).decode():
                raise invalid("The aggregate is not that of the blocks")
        found.settled = True
        self.ready(id)
        return {"Status": found.state}

    # --- listing

    def token(self, *parts: Any) -> str:
        return base64.urlsafe_b64encode(repr((*parts, time.time() + self.token_seconds)).encode()).decode()

    def require_token(self, token: str, reason: str, *parts: Any) -> tuple[Any, ...]:
        import ast

        try:
            found: tuple[Any, ...] = ast.literal_eval(base64.urlsafe_b64decode(token).decode())
        except (ValueError, SyntaxError):
            raise invalid("the token cannot be read", reason) from None
        if found[: len(parts)] != parts or found[-1] < time.time():
            raise invalid("the token has expired or is another one's", reason)
        return found

    def listing(
        self, rows: list[dict[str, Any]], query: dict[str, str], scope: str, key: str, gib: int
    ) -> dict[str, Any]:
        """One page. As AWS may, the first page can be empty and still have a token."""
        first = int(query.get("startingBlockIndex", 0))
        if "pageToken" in query:
            first = self.require_token(query["pageToken"], "INVALID_PAGE_TOKEN", "page", scope)[2]
        rest = [row for row in rows if row["BlockIndex"] >= first]
        most = (
            0 if "pageToken" not in query and self.page < 1000 else min(self.page, int(query.get("maxResults", 10000)))
        )
        shown = rest[:most]
        answer = {key: shown, "VolumeSize": gib, "BlockSize": BLOCK, "ExpiryTime": time.time() + self.token_seconds}
        if len(shown) < len(rest):
            answer["NextToken"] = self.token("page", scope, rest[len(shown)]["BlockIndex"])
        return answer

    def blocks(self, region: str, id: str, query: dict[str, str]) -> dict[str, Any]:
        found = self.complete_one(id, region)
        rows = [{"BlockIndex": i, "BlockToken": self.token("block", id, i)} for i in sorted(found.content())]
        return self.listing(rows, query, id, "Blocks", found.gib)

    def changes(self, region: str, id: str, query: dict[str, str]) -> dict[str, Any]:
        new = self.complete_one(id, region)
        old = self.complete_one(query["firstSnapshotId"], region)
        if old.id not in new.family():
            raise invalid("The snapshots are not related", "UNRELATED_SNAPSHOTS")
        before, after = old.content(), new.content()
        rows = []
        for index in sorted(before.keys() | after.keys()):
            if before.get(index) != after.get(index):
                row: dict[str, Any] = {"BlockIndex": index}
                if index in before:
                    row["FirstBlockToken"] = self.token("block", old.id, index)
                if index in after:
                    row["SecondBlockToken"] = self.token("block", id, index)
                rows.append(row)
        return self.listing(rows, query, f"{old.id} {id}", "ChangedBlocks", new.gib)

    def block(self, region: str, id: str, index: int, query: dict[str, str]) -> bytes:
        found = self.complete_one(id, region)
        self.require_token(query.get("blockToken", ""), "INVALID_BLOCK_TOKEN", "block", id, index)
        return found.content()[index]

    # --- what tests use

    def seed(self, blocks: dict[int, bytes], *, gib: int = 1, region: str = "us-east-1", below: str | None = None,
             gone: tuple[int, ...] = (), encrypted: bool = False) -> str:  # fmt: skip
        """Make a completed snapshot; return its id."""
        parent = self.snapshots[below] if below else None
        made = Snapshot(self.new_id("snap"), region, gib, time.time() - 9999, "completed", encrypted, below=parent)
        made.own = {index: data.ljust(BLOCK, b"\0") for index, data in blocks.items()}
        made.gone = set(gone)
        self.snapshots[made.id] = made
        return made.id
