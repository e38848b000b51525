"""The options of `apply_async`, checked where the job is enqueued: Celery and kombu find some errors too late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

if TYPE_CHECKING:
    from celery import Celery

MAX_PRIORITY = 255
"""The largest priority that brokers know; with Redis everything from 9 on goes into the last band."""
MAX_SECONDS = 1_000_000_000
_SECONDS = ("expires", "countdown", "time_limit", "soft_time_limit")
_DATES = ("expires", "eta")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with each timedelta as its seconds: Celery itself knows no timedelta there."""
    return {
        name: value.total_seconds() if name in _SECONDS and isinstance(value, timedelta) else value
        for name, value in options.items()
    }


def check_options(options: Mapping[str, Any]) -> None:
    """Return if Celery and the worker can use the options.

    Args:
        options: of `apply_async`, after `plain_options`.

    Raises:
        InvalidRequest: one of them is of a wrong kind or out of its range.
    """
    priority = options.get("priority")
    if priority is not None and not (_is_number(priority, int) and 0 <= priority <= MAX_PRIORITY):
        raise InvalidRequest(
            f"priority must be an integer from 0, the most urgent, to 9 (at most {MAX_PRIORITY}), got {brief(priority)}"
        )
    for name in dict.fromkeys((*_SECONDS, *_DATES)):
        value = options.get(name)
        if value is None or (name in _DATES and _is_date(value)):
            continue
        if name not in _SECONDS:
            raise InvalidRequest(f"{name} must be a datetime or an ISO 8601 text, got {brief(value)}")
        if not (_is_number(value, int | float) and abs(value) <= MAX_SECONDS):  # NaN is not, either
            dates = ", a datetime or an ISO 8601 text" if name in _DATES else ""
            raise InvalidRequest(
                f"{name} must be a number of seconds up to {MAX_SECONDS:,}, a timedelta{dates}, got {brief(value)}"
            )


def seconds_until(app: Celery, expires: Any) -> float | None:
    """Return the seconds until a checked `expires`; None for no deadline.

    Args:
        app: whose clock and time zone count.
        expires: seconds, a datetime or an ISO 8601 text.
    """
    if isinstance(expires, str):
        expires = maybe_iso8601(expires)
    if isinstance(expires, datetime):
        return (maybe_make_aware(expires) - app.now()).total_seconds()
    return float(expires) if _is_number(expires, int | float) else None


def _is_number(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _is_date(value: Any) -> bool:
    if isinstance(value, str) and 0 < len(value) <= 64:
        try:
            maybe_iso8601(value)
        except ValueError:
            return False
        return True
    return isinstance(value, datetime)
