"""Refusals: each error's status and headers, and its form as `application/problem+json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from redis.exceptions import RedisError

from sdtpu_worker.errors import (
    BrokerUnavailable,
    DeadlineUnreachable,
    InvalidRequest,
    Overloaded,
    QueueFull,
    SdtpuError,
    StorageError,
)
from sdtpu_worker.redaction import sanitize_url
from sdtpu_worker.web.exchange import Answer, json_answer
from sdtpu_worker.web.job_state import JobError

PROBLEM_TYPE = "application/problem+json"
_RETRY_S = 5
"""Seconds after which a caller should try again where nobody knows better."""
_LATER = {"Retry-After": str(_RETRY_S)}
_NOT_NOW = "the queue cannot be reached, or does not take jobs now; try again later"
_TITLES = {
    400: "The request is not allowed",
    401: "A valid key is needed",
    403: "Not for callers from elsewhere",
    404: "Not found",
    405: "The method is not allowed here",
    409: "The job is not in that state",
    410: "There will be no picture",
    413: "The body is too large",
    415: "The body is of another type",
    416: "The range is not in the picture",
    422: "The key was used for another request",
    429: "Too many jobs",
    500: "The job failed",
    503: "Not available now",
    504: "It took too long",
}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        code: one word for programs.
        detail: what was got, what is allowed and what to do.
        param: the parameter at fault, where one is.
        headers: further headers.
        hidden: what the operator should know and callers should not, such as where Redis is; it is logged.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        hidden: str = "",
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.param = status, code, detail, param
        self.headers, self.hidden = dict(headers or {}), hidden


def refusal_for(exc: Exception) -> Refusal:
    """Return the refusal that an error of this package, or of Redis, means for a caller."""
    match exc:
        case Refusal():
            return exc
        case InvalidRequest():
            return Refusal(400, type(exc).__name__, str(exc), str(exc).split(" ", 1)[0] or None)
        case QueueFull():
            return Refusal(429, "QueueFull", str(exc), headers=_retry_after(exc))
        case DeadlineUnreachable():
            return Refusal(503, "DeadlineUnreachable", str(exc), headers=_retry_after(exc))
        case BrokerUnavailable():
            return Refusal(503, "BrokerUnavailable", _NOT_NOW, headers=_LATER, hidden=str(exc))
        case StorageError():
            return Refusal(410, "StorageError", "the picture is gone, or cannot be read", hidden=str(exc))
        case RedisError() | OSError():
            return Refusal(503, "RedisUnavailable", _NOT_NOW, headers=_LATER, hidden=sanitize_url(repr(exc)))
        case SdtpuError():
            return Refusal(503, type(exc).__name__, _NOT_NOW, headers=_LATER, hidden=str(exc))
    return Refusal(500, "InternalError", "an error of the server itself; its log says more")


def method_refusal(method: str, allowed: Iterable[str]) -> Refusal:
    """Return the refusal of a method that a path has not.

    Args:
        method: of the request.
        allowed: those that the path has.
    """
    names = ", ".join(allowed)
    return Refusal(405, "MethodNotAllowed", f"{method} is not allowed here; allowed: {names}", headers={"Allow": names})


def refusal_for_job(status: str, error: JobError) -> Refusal:
    """Return the refusal for a job that has ended without a picture.

    Args:
        status: `failed` or `cancelled`.
        error: of the job.
    """
    if error.type in ("InvalidRequest", "InvalidMessage"):
        return Refusal(400, error.type, error.detail, error.detail.split(" ", 1)[0] or None)
    if status == "cancelled":
        return Refusal(410, "JobCancelled", f"the job was cancelled: {error.detail}")
    return Refusal(500, error.type, error.detail)


def problem_answer(refusal: Refusal) -> Answer:
    """Return a refusal as RFC 9457 has it."""
    body = {
        "type": "about:blank",
        "title": _TITLES.get(refusal.status, "Error"),
        "status": refusal.status,
        "code": refusal.code,
        "detail": refusal.detail,
        **({"param": refusal.param} if refusal.param else {}),
    }
    return json_answer(body, refusal.status, refusal.headers, PROBLEM_TYPE)


def _retry_after(exc: Overloaded) -> dict[str, str]:
    return {"Retry-After": str(_RETRY_S if exc.eta_s is None else max(1, math.ceil(exc.eta_s)))}
