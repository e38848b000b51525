"""The one way in which a test waits for something that another thread or process does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

from redis.exceptions import RedisError

Answer = TypeVar("Answer")


def wait_until(
    condition: Callable[..., Answer],
    what: str | Callable[[], object] = "the condition to hold",
    timeout_s: float = 60.0,
) -> Answer:
    """Wait until a condition holds; an error of Redis counts as "not yet".

    Args:
        condition: asked again and again, first every two milliseconds, then less often.
        what: what the test waits for, in words; or a function that says it when the time is over.
        timeout_s: seconds.

    Returns:
        The first true answer.

    Raises:
        AssertionError: the condition did not hold in time.
    """
    began_at = time.monotonic()
    while True:
        with contextlib.suppress(RedisError):
            if answer := condition():
                return answer
        waited_s = time.monotonic() - began_at
        if waited_s > timeout_s:
            raise AssertionError(f"waited {timeout_s:g} s in vain for: {what if isinstance(what, str) else what()}")
        time.sleep(min(0.05, max(0.002, waited_s / 20)))
