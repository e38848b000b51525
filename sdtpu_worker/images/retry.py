"""Try a write again while its store has passing trouble: a restart, a failover, no memory, a slow network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from sdtpu_worker.errors import StorageError
from sdtpu_worker.redaction import sanitize_url

logger = logging.getLogger(__name__)

PUT_BUDGET_S = 30.0
"""Seconds for which an image store tries again when it cannot take an image."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _POLL_S = 0.1, 2.0, 0.1


def never() -> bool:
    """Do not give up before the time is over."""
    return False


def store_patiently(
    write: Callable[[], Any],
    failure: str,
    may_pass: Callable[[Exception], bool],
    budget_s: float,
    give_up: Callable[[], bool],
) -> None:
    """Write, with growing pauses between the attempts, until it works, cannot work, or the time is over.

    Args:
        write: the attempt; may be made more than once.
        failure: what to say when it does not work; the cause is added, without passwords.
        may_pass: whether an error can pass by itself.
        budget_s: no attempt starts after this time.
        give_up: asked several times a second while waiting; True ends it.

    Raises:
        StorageError: it did not work.
    """
    deadline, pause_s = time.monotonic() + budget_s, _FIRST_PAUSE_S
    while True:
        try:
            write()
            return
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
    """Wait; return False at once when the caller gives up."""
    until = time.monotonic() + pause_s
    while not give_up():
        left_s = until - time.monotonic()
        if left_s <= 0:
            return True
        time.sleep(min(left_s, _POLL_S))
    return False
