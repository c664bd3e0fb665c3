"""Calls over the network: repeated while they may yet succeed, then one clear error.

Drivers raise what they like: their own classes, the operating system's errors, those of the HTTP
library below. What counts is read off a whole chain of errors: the HTTP status and code that the
store answered, else whether the connection failed.
"""

from __future__ import annotations

import errno
import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import TypeVar

from kdcache.errors import KDCacheError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Tries of one call; the waits between them double up to the longest, about a minute in all.
TRIES = 10
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 12.0
#: No further try begins after this time, but for the first three.
PATIENCE_SECONDS = 60.0

#: Waits before a further try; tests put their own here.
sleep: Callable[[float], None] = time.sleep

#: Answers that another try may turn: timeouts, conflicts of writers, throttling.
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_TRANSIENT_CODES = {
    "ConditionalRequestConflict",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "InternalError",
    "ServiceUnavailable",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
}
_TRANSIENT_ERRNO = {
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EBUSY,  # s3fs for "slow down"
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs for "internal error"
}
#: Package and class of the errors by which HTTP libraries say that a connection failed.
_BROKEN = {
    ("aiohttp", "ClientError"),
    ("botocore", "ConnectionError"),
    ("botocore", "HTTPClientError"),
    ("botocore", "IncompleteReadError"),
    ("botocore", "ResponseParserError"),
    ("botocore", "ResponseStreamingError"),
    ("aiobotocore", "AioReadTimeoutError"),
    ("azure", "IncompleteReadError"),
    ("azure", "ServiceRequestError"),
    ("azure", "ServiceResponseError"),
    ("gcsfs", "ChecksumError"),
    ("google", "TransportError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
    ("requests", "ChunkedEncodingError"),
    ("urllib3", "HTTPError"),
}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_NO_RIGHT = {401, 403}
_CREDENTIALS = "check the credentials and what they allow (docs/stores.md)"


class TruncatedError(ConnectionError):
    """Fewer or more bytes arrived than were asked for."""


def retried(what: str, call: Callable[[], T]) -> T:
    """What a call returns, tried again after errors that may pass.

    Args:
        what: where and what goes wrong, for messages: "s3://bucket/cache/x: cannot be read".
        call: a call that may be repeated: its effect is the same once and twice.

    Raises:
        FileNotFoundError: the store says so. So does FileExistsError, to a create-only write; it
            may be an earlier try of the same call that made the file.
        StorageError: the store refused, or went on failing; one line.
    """
    start, wait = time.monotonic(), FIRST_WAIT_SECONDS
    for number in range(1, TRIES + 1):
        try:
            return call()
        except KDCacheError:
            raise
        except Exception as error:
            found = _answer(what, error)
            if found is not None:
                raise found from error
            seconds = time.monotonic() - start
            if number == TRIES or (number >= 3 and seconds + wait > PATIENCE_SECONDS):
                raise StorageError(
                    f"{what}: {reason(error)}; gave up after {number} tries in {seconds:.0f} s: "
                    "run the same command again when the store answers"
                ) from error
            if number > 1:
                logger.info("%s: %s; trying again (%d of %d)", what, reason(error), number, TRIES)
        sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("the last try returns or raises")


def _answer(what: str, error: Exception) -> Exception | None:
    """What to raise for an error that no further try can turn; None for one that may pass."""
    statuses, codes = _said(error)
    if codes & _NO_BUCKET:
        return StorageError(f"{what}: no such bucket; make it, or correct the URL")
    if isinstance(error, FileNotFoundError | FileExistsError):
        return error
    if 412 in statuses:  # not every server says which condition failed; we only set one
        return FileExistsError(what)
    if is_transient(error):
        return None
    rights = (
        isinstance(error, PermissionError)
        or statuses & _NO_RIGHT
        or "Credential" in (f"{type(error).__name__}")
    )
    advice = _CREDENTIALS if rights else "correct that and run the same command again"
    return StorageError(f"{what}: {reason(error)}; {advice}")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed when it is made again."""
    links = list(_chain(error))
    if any("Cert" in type(link).__name__ for link in links):  # that of another host, or self-made
        return False
    for link in links:  # the nearest that says anything is right; libraries below make up a status
        statuses, codes = _said_by(link)
        if statuses or codes:
            return bool(codes & _TRANSIENT_CODES or statuses & _TRANSIENT_STATUS)
        if _is_broken(link):
            return True
    return any(isinstance(link, OSError) and link.errno in _TRANSIENT_ERRNO for link in links)


def _is_broken(error: BaseException) -> bool:
    """Whether an error says that a connection failed or stood still."""
    if isinstance(error, ConnectionError | TimeoutError | EOFError | HTTPException | ssl.SSLError):
        return True
    return any(
        (kind.__module__.split(".")[0], kind.__name__) in _BROKEN for kind in type(error).__mro__
    )


def _said(error: BaseException) -> tuple[set[int], set[str]]:
    """HTTP status and code that the store answered; nothing where it did not."""
    for link in _chain(error):
        statuses, codes = _said_by(link)
        if statuses or codes:
            return statuses, codes
        if _is_broken(link):
            break
    return set(), set()


def _said_by(error: BaseException) -> tuple[set[int], set[str]]:
    """What one error of a chain knows of an answer."""
    statuses: set[int] = set()
    codes: set[str] = set()
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        statuses.add(int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0))
        codes.add(str(response.get("Error", {}).get("Code") or ""))
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit():
            statuses.add(int(value))
    codes.add(str(getattr(error, "error_code", None) or ""))  # azure
    return {status for status in statuses if 400 <= status < 600}, codes - {""}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the nearest first."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def reason(error: BaseException) -> str:
    """One line of what an error says."""
    statuses, codes = _said(error)
    said = " ".join([*map(str, sorted(statuses)), *sorted(codes - {str(s) for s in statuses})])
    text = str((error.strerror if isinstance(error, OSError) else None) or error)
    line = next((line.strip() for line in text.split("\n") if line.strip()), "")
    if not line:
        line = type(error).__name__
    elif not said and not (isinstance(error, OSError) and error.errno):
        line = f"{type(error).__name__}: {line}"
    shown = f"{said}: {line}" if said else line
    return "".join(c if c.isprintable() else "?" for c in shown)[:300]
