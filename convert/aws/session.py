"""Calls to AWS: clients that all threads share, and the only place that decides whether to ask again.

boto3's own retries are off: it repeats some denied calls, does not repeat a snapshot that is not yet known, and cannot
be told of a rate that all workers share.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from diskmorph.convert.aws.faults import (
    CHECKSUM,
    EXPIRED,
    LIMIT,
    MISSING,
    REFUSED,
    SERVER,
    THROTTLE,
    AwsError,
    Fault,
    error_of,
    fault_of,
)
from diskmorph.convert.aws.rates import Rate, pause
from diskmorph.formats.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

YOUNG = 120.0
"""Seconds after its creation in which AWS may not yet know of a snapshot or an image."""
READ_TIMEOUT = 13.0
CONNECT_TIMEOUT = 6.0
_SERVICES = {"servicequotas": "service-quotas"}
_POOL = 72


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to repeat a call: `tries` failures of the service, `throttled` and `limited` seconds of refusals."""

    tries: int = 10
    throttled: float = 600.0
    limited: float = 60.0
    seconds: float = 300.0


NORMAL = Patience()
SHORT = Patience(tries=5, throttled=20.0, limited=5.0, seconds=40.0)
"""For cleaning up, which must come to an end."""


class Session:
    """One account and its regions, as boto3 finds credentials, region and endpoint. Thread-safe."""

    def __init__(self, region: str | None = None) -> None:
        self._lock = threading.RLock()
        self._clients: dict[tuple[str, str], Any] = {}
        self._age = 0
        self._boto = _new_boto()
        self.retries: Counter[str] = Counter()
        found = region or self._boto.region_name
        if not found:
            raise AwsError("no region is set", code="NoRegionError", hint="set AWS_REGION, or region in ~/.aws/config")
        self.region: str = found

    def client(self, service: str, region: str | None = None) -> Any:
        """Return the client of a service, shared by all threads."""
        key = (_SERVICES.get(service, service), region or self.region)
        with self._lock:
            if key not in self._clients:
                self._clients[key] = self._new_client(*key)
            return self._clients[key]

    def _new_client(self, service: str, region: str) -> Any:
        from botocore.config import Config  # noqa: PLC0415 - heavy
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415

        config = Config(
            max_pool_connections=_POOL,
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            tcp_keepalive=True,
            user_agent_extra="diskmorph",
        )
        try:
            return self._boto.client(service, region_name=region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise AwsError(f"AWS cannot be asked: {error}", hint="see AWS_REGION and AWS_ENDPOINT_URL") from error

    def _renew(self, age: int) -> None:
        """Read credentials anew, once for all threads that met the same expiry."""
        with self._lock:
            if age == self._age:
                self._boto = _new_boto()
                self._clients.clear()
                self._age += 1

    def call(
        self,
        action: str,
        *,
        region: str | None = None,
        born: float | None = None,
        take: Callable[[Any], T] | None = None,
        rate: Rate | None = None,
        stop: threading.Event | None = None,
        patience: Patience = NORMAL,
        settle: Callable[[Fault], T | None] | None = None,
        **words: Any,
    ) -> Any:
        """Call `SERVICE:Operation` until it answers; return the answer, or what `take` makes of it.

        `born`: when (time.monotonic) the thing asked about was made: within two minutes from then "not found" is
        repeated. `rate`: the bucket to draw from. `settle` is asked after each failure that may have been carried out;
        what it returns, if not None, is the answer. Raises AwsError naming the action; Stopped when `stop` is set.
        """
        tries, renewed, begun = 0, 0, time.monotonic()
        while True:
            if rate is not None:
                rate.take(stop)
            age = self._age
            fault, answer, error = self._once(action, region, take, words)
            if fault is None:
                if rate is not None:
                    rate.accepted()
                return answer
            tries += 1
            if fault.sort == THROTTLE and rate is not None:
                rate.refused()
            if settle is not None and (settled := settle(fault)) is not None:
                return settled
            if fault.sort == EXPIRED and renewed < 3:
                renewed += 1
                self._renew(age)
            elif not _again(fault, tries, time.monotonic() - begun, born, patience):
                raise error_of(action, fault, tries=tries) from error
            self.retries[fault.sort] += 1
            pause(_delay(fault, tries), stop)

    def _once(
        self, action: str, region: str | None, take: Callable[[Any], T] | None, words: dict[str, Any]
    ) -> tuple[Fault | None, Any, Exception | None]:
        from botocore import xform_name  # noqa: PLC0415 - heavy

        service, _, operation = action.partition(":")
        method = getattr(self.client(service, region), xform_name(operation))
        try:
            answer = method(**words)
            return None, take(answer) if take is not None else answer, None
        except AwsError:
            raise
        except Exception as error:
            if not _is_answer(error):
                raise
            return fault_of(error), None, error

    def pages(self, action: str, key: str, *, region: str | None = None, **words: Any) -> Iterator[Any]:
        """Yield the entries of all pages of a listing."""
        token: str | None = None
        while True:
            more: dict[str, Any] = {"NextToken": token} if token else {}
            answer = self.call(action, region=region, **words, **more)
            yield from answer.get(key) or ()
            token = answer.get("NextToken")
            if not token:
                return

    def known(self, action: str, **words: Any) -> Any:
        """Call an action that the job can do without; None where it is denied or not there."""
        with contextlib.suppress(AwsError):
            return self.call(action, patience=SHORT, **words)
        return None


def _new_boto() -> Any:
    try:
        import boto3  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        raise UnsupportedError(
            "`diskmorph aws` needs boto3", feature="aws", hint="install it with pip install 'diskmorph[aws]'"
        ) from error
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    try:
        return boto3.Session()
    except BotoCoreError as error:
        raise AwsError(f"AWS cannot be asked: {error}", hint="see AWS_PROFILE and ~/.aws/config") from error


def _is_answer(error: Exception) -> bool:
    """Whether an exception is AWS's or the network's, and not a fault of ours or of the source."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
    from botocore.parsers import ResponseParserError  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    from diskmorph.convert.aws.faults import WrongChecksumError  # noqa: PLC0415

    kinds = (
        BotoCoreError,
        ClientError,
        ResponseParserError,
        HTTPError,
        WrongChecksumError,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(error, kinds)


def _again(fault: Fault, tries: int, seconds: float, born: float | None, patience: Patience) -> bool:
    if fault.sort == THROTTLE:
        return seconds < patience.throttled
    if fault.sort == LIMIT:
        return seconds < patience.limited
    if fault.sort == MISSING:
        return born is not None and time.monotonic() - born < YOUNG
    if fault.sort in {SERVER, CHECKSUM}:
        return tries < patience.tries and seconds < patience.seconds
    return False


_BASE = {THROTTLE: 0.2, LIMIT: 2.0, MISSING: 0.4, SERVER: 0.1, CHECKSUM: 0.05, EXPIRED: 0.2, REFUSED: 0.0}
_MOST = {THROTTLE: 5.0, LIMIT: 10.0, MISSING: 3.0, SERVER: 8.0, CHECKSUM: 1.0, EXPIRED: 1.0, REFUSED: 0.0}


def _delay(fault: Fault, tries: int) -> float:
    """Return seconds to wait: doubled at each try, a random part of it, so that workers do not come back together."""
    most = min(_MOST[fault.sort], _BASE[fault.sort] * 2.0 ** min(tries - 1, 10))
    return random.uniform(0.5, 1.0) * most  # noqa: S311 - no secret
