"""Which errors are tried again, how often, and what is said in the end."""

import errno
import logging
import ssl

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
)
from botocore.exceptions import ConnectionClosedError as BotoClosedError
from s3fs.errors import translate_boto_error

from kdcache.errors import KDCacheError, StorageError
from kdcache.formats.stores import retry
from kdcache.formats.stores.retry import TruncatedError, is_transient, reason, retried

WHAT = "s3://bucket/cache/x: cannot be read"


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited, none of them really."""
    found: list[float] = []
    monkeypatch.setattr(retry, "sleep", found.append)
    return found


def client_error(status: int, code: str, **more: str) -> ClientError:
    response = {
        "Error": {"Code": code, "Message": f"the server says {code}", **more},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(response, "GetObject")


def s3(status: int, code: str, **more: str) -> Exception:
    """What s3fs raises for an answer of S3."""
    return translate_boto_error(client_error(status, code, **more))


def caused(error: Exception, cause: Exception) -> Exception:
    """An error that another one led to."""
    error.__cause__ = cause
    return error


def http_error(module: str, name: str, **attributes: object) -> Exception:
    """An error as another driver has it, which need not be installed."""
    kind = type(name, (Exception,), {"__module__": module})
    error = kind("it says so")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


PASSING = {
    "500": s3(500, "InternalError"),
    "503": s3(503, "SlowDown"),
    "503 without a code": s3(503, "503"),
    "429": s3(429, "TooManyRequests"),
    "slow request": s3(400, "RequestTimeout"),
    "upload cut off": s3(400, "IncompleteBody"),
    "two writers at once": s3(409, "ConditionalRequestConflict"),
    "body cut off": TruncatedError("3 bytes came of 4"),
    "reset": ConnectionResetError(errno.ECONNRESET, "reset"),
    "unreachable": OSError(errno.EHOSTUNREACH, "no route"),
    "closed": BotoClosedError(endpoint_url="http://x"),
    "closed, and a library below makes up a status": caused(
        BotoClosedError(endpoint_url="http://x"),
        http_error("aiohttp.client_exceptions", "ClientResponseError", status=400),
    ),
    "refused": EndpointConnectionError(endpoint_url="http://x"),
    "connect timeout": ConnectTimeoutError(endpoint_url="http://x"),
    "timeout": TimeoutError(),
    "tls": ssl.SSLError("bad record"),
    "gcs 503": http_error("gcsfs.retry", "HttpError", code=503),
    "gcs checksum": http_error("gcsfs.retry", "ChecksumError"),
    "azure 500": http_error("azure.core.exceptions", "HttpResponseError", status_code=500),
    "azure connection": http_error("azure.core.exceptions", "ServiceRequestError"),
    "http body": http_error("aiohttp.client_exceptions", "ClientError"),
}
FINAL = {
    "403": (s3(403, "AccessDenied"), "check the credentials"),
    "bad key": (s3(403, "InvalidAccessKeyId"), "check the credentials"),
    "no credentials": (NoCredentialsError(), "check the credentials"),
    "no bucket": (s3(404, "NoSuchBucket"), "no such bucket; make it, or correct the URL"),
    "bad name": (s3(400, "InvalidBucketName"), "InvalidBucketName"),
    "bad argument": (ParamValidationError(report="bad"), "ParamValidationError"),
    "not implemented": (s3(501, "NotImplemented"), "NotImplemented"),
    "certificate": (ssl.SSLCertVerificationError("self-signed"), "self-signed"),
    "gcs 401": (http_error("gcsfs.retry", "HttpError", code=401), "check the credentials"),
    "something else": (RuntimeError("a bug"), "RuntimeError: a bug"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name, waits):
    assert is_transient(PASSING[name])
    outcomes = [PASSING[name], PASSING[name], "found"]

    def call():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retried(WHAT, call) == "found"
    assert len(waits) == 2


@pytest.mark.parametrize("name", FINAL)
def test_what_stays_is_said_at_once(name, waits):
    error, said = FINAL[name]

    def call():
        raise error

    with pytest.raises(StorageError) as caught:
        retried(WHAT, call)
    assert str(caught.value).startswith(WHAT)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not waits


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (s3(404, "NoSuchKey"), FileNotFoundError),
        (FileNotFoundError("x"), FileNotFoundError),
        (FileExistsError("x"), FileExistsError),
        (s3(412, "PreconditionFailed", Condition="If-None-Match"), FileExistsError),
        (s3(412, "PreconditionFailed"), FileExistsError),  # MinIO names no condition
    ],
)
def test_answers_are_passed_on(error, kind, waits):
    def call():
        raise error

    with pytest.raises(kind) as caught:
        retried(WHAT, call)
    assert not isinstance(caught.value, KDCacheError)
    assert not waits


def test_our_own_errors_pass_untouched(waits):
    ours = StorageError("ours")

    def call():
        raise ours

    with pytest.raises(StorageError) as caught:
        retried(WHAT, call)
    assert caught.value is ours


def test_waits_double_with_jitter_up_to_about_a_minute(waits, monkeypatch):
    monkeypatch.setattr(retry.time, "monotonic", lambda: 7.0)

    def call():
        raise s3(503, "SlowDown")

    with pytest.raises(StorageError) as caught:
        retried(WHAT, call)
    assert str(caught.value) == (
        f"{WHAT}: 503 SlowDown: the server says SlowDown; gave up after 10 tries in 0 s: "
        "run the same command again when the store answers"
    )
    full = [0.25, 0.5, 1, 2, 4, 8, 12, 12, 12]
    assert len(waits) == len(full)
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, full, strict=True))
    assert 30 <= sum(full) <= 60


def test_the_second_retry_and_later_ones_are_told(waits, caplog):
    outcomes = [s3(503, "SlowDown"), TimeoutError("no answer"), s3(500, "InternalError"), None]

    def call():
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    with caplog.at_level(logging.INFO, logger="kdcache"):
        retried(WHAT, call)
    assert caplog.messages == [
        f"{WHAT}: TimeoutError: no answer; trying again (2 of 10)",
        f"{WHAT}: 500 InternalError: the server says InternalError; trying again (3 of 10)",
    ]


def test_patience_ends_a_slow_failure_after_three_tries(waits, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])

    def call():
        clock[0] += 45.0
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="3 tries in 135 s"):
        retried(WHAT, call)


def test_an_interrupt_is_not_an_error_of_the_store(waits):
    def call():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retried(WHAT, call)
    assert not waits


def test_a_reason_is_one_printable_line():
    hostile = reason(ValueError(f"first{chr(27)}[2J\nsecond"))
    assert hostile == "ValueError: first?[2J"
    assert reason(OSError(errno.ENETUNREACH, "Network is unreachable")) == "Network is unreachable"
    assert reason(TimeoutError()) == "TimeoutError"
