"""The broker as a client meets it: its keys, how long to wait for it, what to say when it takes no job."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sdtpu_worker.errors import BrokerUnavailable

if TYPE_CHECKING:
    from celery import Celery

PATIENCE_S = 3.0
"""How long a client waits for a result backend that is down; Celery would try 20 times, for 19 s."""

_REFUSALS = {  # by the names of redis-py's exceptions
    "OutOfMemoryError": (
        "is out of memory (maxmemory) and takes no writes",
        "raise maxmemory, or free memory (results and images stay for result_expires)",
    ),
    "ReadOnlyError": (
        "is a read-only replica",
        "point broker_url and result_backend at the primary, or wait for the end of a failover",
    ),
    "BusyLoadingError": ("is still loading its data", "try again when it is done"),
    "AuthenticationError": (
        "does not accept this user or password",
        "correct them in broker_url and result_backend",
    ),
    "NoPermissionError": (
        "does not permit this user what it takes to enqueue a job",
        "extend the user's ACL, see the text in parentheses",
    ),
}
_ORDINARY = ("cannot be reached", "start it, or correct broker_url and result_backend")
_DISK_FULL = ("cannot save to its disk and takes no writes", "see Redis' log; free its disk")

_URL = re.compile(
    r"(?P<scheme>[\w+.-]+)://"
    r"(?:(?P<user>[^:@/?#]*)(?P<password>:[^/?#]*)?@)?"
    r"(?P<place>(?:\[[^\]@]*\]|[^@:/?#]*)(?::\d+)?(?:/[^?#@]*)?)"
    r"(?:[?#].*)?"
)
_enqueuing = threading.local()


@contextlib.contextmanager
def bounded_wait(app: Celery) -> Iterator[None]:
    """Let the calling thread wait at most about `PATIENCE_S` for a Redis result backend while it enqueues.

    Celery subscribes to a job's result before it sends the job, and tries that for long. Other threads, and waiting
    for results, stay as patient as they are; so does everybody whose `result_backend_transport_options` have a
    `retry_policy`.
    """
    backend = app.backend
    configured = "retry_policy" in (app.conf.result_backend_transport_options or {})
    if hasattr(backend, "on_connection_error") and not configured:
        _make_boundable(backend)
    _enqueuing.until = time.monotonic() + PATIENCE_S
    try:
        yield
    finally:
        _enqueuing.until = None


def unavailable(app: Celery, exc: BaseException, at_backend: bool = False) -> BrokerUnavailable:
    """Return the error for a job that Redis did not take.

    Args:
        app: whose Redis it is.
        exc: what Celery raised.
        at_backend: whether the result backend failed, not the broker.
    """
    cause: BaseException = exc
    state, remedy = _ORDINARY
    chain = list(_causes(exc))
    for cause in chain:
        names = [cls.__name__ for cls in type(cause).__mro__]
        known = next((_REFUSALS[name] for name in names if name in _REFUSALS), None)
        if known or str(cause).startswith("MISCONF"):
            state, remedy = known or _DISK_FULL
            break
    else:
        cause = chain[-1]
    urls = app.conf.result_backend if at_backend else (app.conf.broker_write_url or app.conf.broker_url)
    where = "the result backend" if at_backend else "Redis"
    text = re.sub(r"\S+://\S+", lambda url: without_password(url[0]), " ".join(str(cause).split()))
    return BrokerUnavailable(
        f"the job was not enqueued: {where} at {without_password(urls or 'redis://localhost:6379/0')} {state} ({text});"
        f" {remedy}"
    )


def plain_client(client: Any) -> tuple[Any, str]:
    """Return a client that does not touch keys, and the prefix for them: kombu's prefixes some commands only."""
    from redis import Redis

    prefix = getattr(client, "global_keyprefix", "")
    return (Redis(connection_pool=client.connection_pool), prefix) if prefix else (client, "")


def without_password(urls: Any) -> str:
    """Return one or more URLs, a list or separated by `;`, without passwords and queries."""
    parts = urls if isinstance(urls, list | tuple) else re.split(r";(?=[\w+.-]+://)", str(urls))
    return ";".join(map(_without_password, map(str, parts)))


def _without_password(url: str) -> str:
    match = _URL.fullmatch(url.strip())
    if match is None:  # not a URL that works: no telling where its password ends
        scheme, separator, _ = url.partition("://")
        return f"{scheme}://**" if separator else "**"
    user, password = match["user"], match["password"]
    userinfo = "" if user is None else f"{user}{':**' if password else ''}@"
    return f"{match['scheme']}://{userinfo}{match['place']}"


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while exc is not None and seen < 10:
        yield exc
        exc, seen = exc.__cause__, seen + 1


def _make_boundable(backend: Any) -> None:
    """Make a backend ask `_enqueuing` before it tries again; once for each backend."""
    if "on_connection_error" in vars(backend):
        return
    original = backend.on_connection_error

    def on_connection_error(max_retries: int | None, exc: Exception, *rest: Any) -> float:
        until = getattr(_enqueuing, "until", None)
        hopeless = any(cls.__name__ == "AuthenticationError" for cls in type(exc).__mro__)
        if until is not None and (hopeless or time.monotonic() >= until):
            raise exc
        return original(max_retries, exc, *rest)

    backend.on_connection_error = on_connection_error
