"""What goes wrong on request: rules that are asked about every call, drawn from a seed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

KINDS = (
    "throttle",
    "500",
    "503",
    "reset",
    "lost",
    "slow",
    "bad-answer",
    "refuse-checksum",
    "expired",
    "deny",
    "hang",
    "quota",
)
"""`reset` drops the call unheard, `lost` carries it out and drops the answer; `bad-answer` spoils a checksum in it."""


@dataclass
class Rule:
    """A fault for calls whose `SERVICE:Action` matches: with a probability, or the first `times` of them; `seconds`
    of a slow answer."""

    kind: str
    action: str = "*"
    chance: float = 1.0
    times: int | None = None
    seconds: float = 0.3
    after: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`throttle:ebs:*:0.1` is KIND:SERVICE:ACTION[:CHANCE]."""
        kind, service, action, *chance = text.split(":")
        return cls(kind, f"{service}:{action}", float(chance[0]) if chance else 1.0)


class Faults:
    """The rules of one fake. `struck` counts what happened."""

    def __init__(self, seed: int = 1) -> None:
        self.rules: list[Rule] = []
        self.struck: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._seen: Counter[int] = Counter()
        self.release = threading.Event()

    def add(self, kind: str, action: str = "*", **more: object) -> Rule:
        rule = Rule(kind, action, **more)  # type: ignore[arg-type]
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """No more faults; what hangs is let go."""
        self.rules.clear()
        self.release.set()
        self.release = threading.Event()

    def draw(self, action: str) -> Rule | None:
        """The fault that befalls one call."""
        with self._lock:
            for rule in self.rules:
                if not fnmatchcase(action, rule.action):
                    continue
                seen = self._seen[id(rule)] = self._seen[id(rule)] + 1
                if seen <= rule.after or (rule.times is not None and seen > rule.after + rule.times):
                    continue
                if self._random.random() < rule.chance:
                    self.struck[rule.kind] += 1
                    return rule
        return None
