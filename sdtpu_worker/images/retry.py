"""Asks an image store again while its trouble may pass: a restart, a failover, no memory, a slow network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sdtpu_worker.errors import StorageError
from sdtpu_worker.redaction import sanitize_url

T = TypeVar("T")

logger = logging.getLogger(__name__)

PUT_BUDGET_S = 30.0
"""Seconds for which a store is asked again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _POLL_S = 0.1, 2.0, 0.1


def never() -> bool:
    """Return False: do not give up before the time is over."""
    return False


def try_patiently(
    attempt: Callable[[], T],
    failure: str,
    may_pass: Callable[[Exception], bool],
    budget_s: float,
    give_up: Callable[[], bool],
) -> T:
    """Write or read, and try again with growing pauses until that succeeds, cannot succeed, or the time is over.

    Args:
        attempt: makes one attempt.
        failure: the beginning of the error's text; the cause is added, without passwords.
        may_pass: says whether an error may pass by itself; if not, it is not tried again.
        budget_s: no attempt starts after this many seconds.
        give_up: asked several times a second during a pause; True ends it.

    Raises:
        StorageError: no attempt succeeded.
    """
    deadline, pause_s = time.monotonic() + budget_s, _FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except Exception as exc:  # every file system of fsspec has its own errors
            cause = sanitize_url(f"{failure}: {type(exc).__name__}: {exc}")
            if not may_pass(exc):
                raise StorageError(cause) from exc
            if time.monotonic() + pause_s > deadline:
                raise StorageError(f"{cause} (tried again for {budget_s:g} s)") from exc
            if pause_s == _FIRST_PAUSE_S:
                logger.warning("%s; trying again for %g s", cause, budget_s)
            if not _wait(pause_s, give_up):
                raise StorageError(f"{cause} (not tried again: the job was given up)") from exc
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _wait(pause_s: float, give_up: Callable[[], bool]) -> bool:
    """Wait and return True; return False as soon as the caller gives up."""
    until = time.monotonic() + pause_s
    while not give_up():
        left_s = until - time.monotonic()
        if left_s <= 0:
            return True
        time.sleep(min(left_s, _POLL_S))
    return False
