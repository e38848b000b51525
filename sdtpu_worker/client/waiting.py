"""How many jobs wait in the Redis lists of the task's queues, and how long the next one has been waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery.utils.time import maybe_make_aware

from sdtpu_worker.contract.queues import SENT_AT_HEADER, read_sent_at

# Returns Redis' time, and for each list its length and, of the message that is next, when it was sent and its `eta`.
# In a message these two names stand in JSON with their quotes bare, which no text within a JSON text has.
_LOOK_AT_LISTS = f"""
local now, found = redis.call('TIME'), {{}}
for i, list in ipairs(KEYS) do
    local length, sent, due = redis.call('LLEN', list), '', ''
    if length > 0 then
        local message = redis.call('LINDEX', list, -1)
        sent = string.match(message, '"{SENT_AT_HEADER}": ?([%d.]+)') or ''
        due = string.match(message, '"eta": ?"([%w:.+-]+)"') or ''
    end
    found[i] = {{length, sent, due}}
end
return {{now, found}}
"""


@dataclass(frozen=True)
class Waiting:
    """The jobs that wait in one queue.

    Attributes:
        counts: how many, by the lowest priority of each band, the most urgent first.
        oldest_s: for how many seconds the one of the next jobs of all bands that has waited longest has done so, since
            its client sent it or since it was due; None where none waits or no client has sent the time.
    """

    counts: Mapping[int, int]
    oldest_s: float | None


def read_waiting(redis: Any, lists: Mapping[str, Sequence[str]], bands: Sequence[int]) -> dict[str, Waiting]:
    """Return what waits in each queue, all at one moment.

    Args:
        redis: a client that leaves the names of keys as they are.
        lists: the lists of each queue, one for each band.
        bands: the lowest priority of each band.

    Raises:
        redis.exceptions.RedisError: Redis does not answer, or refuses.
    """
    names = [name for each in lists.values() for name in each]
    now, found = redis.eval(_LOOK_AT_LISTS, len(names), *names)
    now_s = int(now[0]) + int(now[1]) / 1e6
    rest = iter(found)
    states = {}
    for queue, each in lists.items():
        of_queue = [next(rest) for _ in each]
        since = [at for _, sent, due in of_queue if (at := _waiting_since(sent, due)) is not None]
        counts = dict(zip(bands, (int(length) for length, _, _ in of_queue), strict=True))
        states[queue] = Waiting(counts, max(0.0, now_s - min(since)) if since else None)
    return states


def _waiting_since(sent: bytes | str, due: bytes | str) -> float | None:
    """Return when a job was sent or due, whichever is later, in seconds since 1970; None if no client said so."""
    times = [at for at in (_seconds(as_text(sent)), _timestamp(as_text(due))) if at is not None]
    return max(times, default=None)


def _seconds(text: str) -> float | None:
    try:
        return read_sent_at(float(text))
    except ValueError:
        return None


def _timestamp(text: str) -> float | None:
    try:
        at = maybe_make_aware(datetime.fromisoformat(text)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return at if math.isfinite(at) else None


def as_text(value: bytes | str) -> str:
    """Return what Redis answered as text, whether its client decodes answers or not."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
