"""The error for a job that Redis did not take: what is wrong with Redis, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdtpu_worker.errors import BrokerUnavailable
from sdtpu_worker.redaction import without_password

if TYPE_CHECKING:
    from celery import Celery

_CLUSTER = (
    "belongs to a Redis Cluster, which cannot be the broker",
    "let broker_url name a server that is no cluster (managed services: cluster mode disabled)",
)
_REFUSALS = {  # by the names of redis-py's exceptions: the state of Redis, and the remedy
    "OutOfMemoryError": (
        "is out of memory (maxmemory) and takes no writes",
        "raise maxmemory, or free memory (results and images stay for result_expires)",
    ),
    "ReadOnlyError": (
        "is a read-only replica",
        "point broker_url and result_backend at the primary, or wait for the end of a failover",
    ),
    "ClusterCrossSlotError": _CLUSTER,
    "ClusterDownError": _CLUSTER,
    "AskError": _CLUSTER,  # and MovedError, its subclass
    "BusyLoadingError": ("is still loading its data", "try again when it is done"),
    "AuthenticationError": (
        "does not accept this user or password",
        "correct them in broker_url and result_backend",
    ),
    "NoPermissionError": (
        "does not permit this user a command that enqueues a job",
        "extend the user's ACL; the text in parentheses names what is missing",
    ),
}
_NOT_REACHED = ("cannot be reached", "start it, or correct broker_url and result_backend")
_DISK_FULL = ("cannot save to its disk and takes no writes", "look into Redis' log, and free its disk")
_MAX_CAUSES = 10


def unavailable(
    app: Celery, exc: BaseException, at_backend: bool = False, failed: str = "the job was not enqueued"
) -> BrokerUnavailable:
    """Return the error for what could not be done because Redis, or what else is configured, did not take part.

    Args:
        app: the client's app, whose broker or result backend failed.
        exc: what Celery raised.
        at_backend: whether the result backend failed; False for the broker.
        failed: what could not be done.
    """
    cause: BaseException = exc
    state, remedy = _NOT_REACHED
    chain = list(_causes(exc))
    for cause in chain:
        names = [cls.__name__ for cls in type(cause).__mro__]
        refusal = next((_REFUSALS[name] for name in names if name in _REFUSALS), None)
        if refusal or str(cause).startswith("MISCONF"):
            state, remedy = refusal or _DISK_FULL
            break
    else:
        cause = chain[-1]
    urls = app.conf.result_backend if at_backend else (app.conf.broker_write_url or app.conf.broker_url)
    place = without_password(urls or "redis://localhost:6379/0")
    broker = "Redis" if place.startswith(("redis", "sentinel")) else "the broker"
    server = "the result backend" if at_backend else broker
    return BrokerUnavailable(f"{failed}: {server} at {place} {state} ({_text(cause)}); {remedy}")


def cause_of(exc: BaseException) -> str:
    """Return what lies behind an error in one line without passwords."""
    *_, last = _causes(exc)
    return _text(last)


def _text(exc: BaseException) -> str:
    return re.sub(r"\S+://\S+", lambda url: without_password(url[0]), " ".join(str(exc).split()))


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and the causes behind it, the last cause last."""
    count = 0
    while exc is not None and count < _MAX_CAUSES:
        yield exc
        exc, count = exc.__cause__, count + 1
