"""What AWS answers when it does not do what was asked, sorted by what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diskmorph.formats.errors import DiskmorphError

THROTTLE, SERVER, MISSING, CHECKSUM, EXPIRED, LIMIT, REFUSED = (
    "throttled", "server", "missing", "checksum", "expired", "limit", "refused",
)  # fmt: skip

_THROTTLES = frozenset(
    {
        "RequestThrottledException",
        "RequestThrottled",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "SlowDown",
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
    }
)
_SERVER = frozenset(
    {
        "InternalServerException",
        "InternalError",
        "InternalFailure",
        "ServiceUnavailable",
        "Unavailable",
        "ServerInternal",
        "RequestTimeout",
        "RequestTimeoutException",
        "BadDigest",  # the body was damaged on its way
        "IncompleteBody",
    }
)
_MISSING = frozenset({"ResourceNotFoundException", "InvalidSnapshot.NotFound", "InvalidAMIID.NotFound"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})
_DENIED = frozenset(
    {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "UnauthorizedException", "AuthFailure"}
)


class AwsError(DiskmorphError):
    """AWS refuses a call, or cannot be reached; `action` names the call (`ebs:PutSnapshotBlock`), `code` the reason."""

    kind = "aws"

    def __init__(self, problem: str, *, action: str = "", code: str = "", **place: Any) -> None:
        super().__init__(problem, **place)
        self.action = action
        self.code = code


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed call. `ambiguous`: it may have been carried out all the same."""

    sort: str
    code: str
    reason: str
    message: str
    ambiguous: bool = False

    @property
    def denied(self) -> bool:
        """Whether a permission is missing."""
        return self.code in _DENIED

    @property
    def gone(self) -> bool:
        """Whether the thing asked about does not exist."""
        return self.sort == MISSING


def fault_of(error: Exception) -> Fault:
    """Return what an exception of boto3 means."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return _transport(error)
    said = response.get("Error", {})
    code, message = str(said.get("Code", "")), str(said.get("Message", "") or error)
    reason = str(response.get("Reason", "") or said.get("Reason", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return Fault(_sort(status, code, reason, message), code, reason, message, ambiguous=status >= 500)


def _sort(status: int, code: str, reason: str, message: str) -> str:
    if code == "ConcurrentLimitExceededException":
        return LIMIT
    if code in _THROTTLES or "THROTTLED" in reason:
        return THROTTLE
    if code in _EXPIRED:
        return EXPIRED
    if code in _MISSING or reason == "SNAPSHOT_NOT_FOUND":
        return MISSING
    if code in _SERVER or (status >= 500 and status != 501) or "Failed to read block data" in message:
        return SERVER
    if code == "ValidationException" and ("checksum" in message.lower() and "aggregate" not in message.lower()):
        return CHECKSUM
    if reason == "CONFLICTING_BLOCK_UPDATE":
        return SERVER
    return REFUSED


def _transport(error: Exception) -> Fault:
    """Return the fault of a call that got no answer, or one that cannot be read."""
    name = type(error).__name__
    text = " ".join(str(error).split())
    if name in {
        "NoCredentialsError",
        "PartialCredentialsError",
        "NoRegionError",
        "ParamValidationError",
        "ProfileNotFound",
    }:
        return Fault(REFUSED, name, "", text)
    if name in {"TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "CredentialRetrievalError"}:
        return Fault(REFUSED, name, "", text)
    if isinstance(error, WrongChecksumError):
        return Fault(CHECKSUM, name, "", text, ambiguous=True)
    return Fault(SERVER, name, "", text, ambiguous=True)


class WrongChecksumError(Exception):
    """An answer whose checksum is not that of its content."""


def error_of(action: str, fault: Fault, *, tries: int = 1) -> AwsError:
    """Return the error that a user sees for a fault that is not tried again."""
    code = f" ({fault.code})" if fault.code else ""
    hint: str | None = None
    if fault.denied:
        problem = f"{action} is denied: {fault.message}{code}"
        hint = f"allow {action} to this user or role (docs/aws.md has a policy)"
    elif fault.sort in {SERVER, THROTTLE, CHECKSUM, LIMIT}:
        problem = f"{action} fails: {fault.message}{code}"
        hint = f"given up after {tries} tries" if tries > 1 else None
    else:
        problem = f"{action} is refused: {fault.message}{code}"
        hint = _HINTS.get(fault.code)
    if fault.sort == EXPIRED:
        hint = "get new credentials, then say the same command again"
    return AwsError(problem, action=action, code=fault.code, hint=hint)


_HINTS = {
    "ServiceQuotaExceededException": "ask for a higher service quota, or remove old snapshots",
    "NoCredentialsError": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "NoRegionError": "set AWS_REGION",
}
