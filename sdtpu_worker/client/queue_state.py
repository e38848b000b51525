"""What lies in the task's queues: how many jobs wait, are held by workers or deferred; and how to purge them.

kombu keeps the jobs of one queue in four Redis lists, one for each band of priorities, and a worker keeps the jobs that
it holds or defers elsewhere. So no single key tells the load: `LLEN sdtpu` sees the most urgent band alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.routing import device_queues
from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.load_report import WorkerLoad, read_loads
from sdtpu_worker.contract.queues import (
    DELAYED_KEY,
    HELD_KEY,
    LATEST_SENT_AT,
    LEASES_KEY,
    SENT_AT_HEADER,
    plain_client,
    waiting_lists,
)
from sdtpu_worker.errors import BrokerUnavailable, ConfigurationError
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery

_AT_ONCE = 500
# The name of its list stands before each held or deferred message. KEYS: the hash of them, a sorted set of tags.
_LISTS_OF_TAGS = """
local lists = {}
for _, tag in ipairs(redis.call('ZRANGE', KEYS[2], ARGV[1], ARGV[2])) do
    local record = redis.call('HGET', KEYS[1], tag)
    if record then lists[#lists + 1] = string.match(record, '^[^\\n]*') end
end
return lists
"""
# Drops the deferred messages among ARGV[2...]'s tags whose list is among KEYS[3...]; returns how many.
_DROP_DEFERRED = """
local ours, dropped = {}, 0
for i = 3, #KEYS do ours[KEYS[i]] = true end
for _, tag in ipairs(ARGV) do
    local record = redis.call('HGET', KEYS[1], tag)
    if record and ours[string.match(record, '^[^\\n]*')] and redis.call('ZREM', KEYS[2], tag) == 1 then
        redis.call('HDEL', KEYS[1], tag)
        dropped = dropped + 1
    end
end
return dropped
"""


@dataclass(frozen=True)
class QueueState:
    """The jobs of one queue.

    Attributes:
        queue: its name.
        waiting: the number of jobs that wait, by the lowest priority of each band, the most urgent first.
        held: the number of jobs that workers hold: on the devices, or next in line for them.
        deferred: the number of jobs that wait for their `countdown` or `eta`.
        oldest_sent_at: when the oldest waiting job was sent, in seconds since 1970; None where no job waits, or none
            says it.
    """

    queue: str
    waiting: dict[int, int]
    held: int
    deferred: int
    oldest_sent_at: float | None = None

    @property
    def load(self) -> int:
        """Jobs that wait or are held: what an autoscaler should look at."""
        return sum(self.waiting.values()) + self.held


def read_queues(app: Celery) -> list[QueueState]:
    """Return the state of each of the task's queues; the queues are read one after the other, not at one moment.

    Args:
        app: an app of a client or a worker.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with _broker(app) as (redis, prefix, queues, bands):
        held = _count_by_list(redis, prefix, LEASES_KEY)
        deferred = _count_by_list(redis, prefix, DELAYED_KEY)
        states = []
        for queue, lists in queues.items():
            lengths = [redis.llen(name) for name in lists]
            oldest = [redis.lindex(name, -1) for name, length in zip(lists, lengths, strict=True) if length]
            states.append(
                QueueState(
                    queue,
                    dict(zip(bands, lengths, strict=True)),
                    sum(held.get(name, 0) for name in lists),
                    sum(deferred.get(name, 0) for name in lists),
                    _oldest_sent_at(oldest),
                )
            )
        return states


def purge_queues(app: Celery) -> int:
    """Delete the jobs that wait or are deferred in all of the task's queues; return how many.

    Jobs that workers hold continue. Nothing is stored for the deleted ones: they stay PENDING, as after `celery purge`.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with _broker(app) as (redis, prefix, queues, _):
        lists = [name for names in queues.values() for name in names]
        deleted = 0
        for name in lists:
            length, _deleted = redis.pipeline().llen(name).delete(name).execute()
            deleted += length
        keys = [prefix + HELD_KEY, prefix + DELAYED_KEY, *lists]
        tags = redis.zrange(prefix + DELAYED_KEY, 0, -1)
        for start in range(0, len(tags), _AT_ONCE):
            deleted += int(redis.eval(_DROP_DEFERRED, len(keys), *keys, *tags[start : start + _AT_ONCE]))
        return deleted


@contextlib.contextmanager
def _broker(app: Celery) -> Iterator[tuple[Any, str, dict[str, list[str]], Sequence[int]]]:
    """Connect to the broker; yield its client, the prefix of keys, the lists of each queue, and the bands."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    with app.connection_for_read() as connection:
        if connection.transport.driver_type != "redis":
            raise ConfigurationError(
                f"the queues can be read only where the broker is Redis, got {sanitize_url(connection.as_uri())};"
                " name the app with -A, or set broker_url"
            )
        try:
            connection.ensure_connection(max_retries=len(connection.alt) or 1, interval_start=0)
            channel = connection.default_channel
            with channel.conn_or_acquire() as client:
                redis, prefix = plain_client(client)
                queues = {queue: waiting_lists(channel, queue, prefix) for queue in device_queues(app)}
                yield redis, prefix, queues, channel.priority_steps
        except (OperationalError, RedisError, OSError) as exc:
            raise BrokerUnavailable(f"Redis cannot be read: {sanitize_url(str(exc))}; correct broker_url") from exc


def read_hosts(app: Celery) -> list[WorkerLoad]:
    """Return the load reports of the workers that take jobs.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with _broker(app) as (redis, prefix, _, _):
        return read_loads(redis, read_setting("sdtpu_queue", app.conf), prefix)


@contextlib.contextmanager
def broker_client(app: Celery) -> Iterator[Any]:
    """Give a client of the broker's Redis for the block.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with _broker(app) as (redis, *_):
        yield redis


def _oldest_sent_at(messages: Iterable[bytes | None]) -> float | None:
    """Return the earliest time of sending in some messages, of any origin."""
    times = []
    for message in messages:
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            sent_at = json.loads(message or "")["headers"][SENT_AT_HEADER]
            if isinstance(sent_at, int | float) and 0 <= sent_at <= LATEST_SENT_AT:
                times.append(float(sent_at))
    return min(times, default=None)


def _count_by_list(redis: Any, prefix: str, tags_key: str) -> dict[str, int]:
    """Return how many messages of a sorted set of tags came from each list."""
    counts: dict[str, int] = {}
    size = redis.zcard(prefix + tags_key)
    for start in range(0, size, _AT_ONCE):
        lists = redis.eval(_LISTS_OF_TAGS, 2, prefix + HELD_KEY, prefix + tags_key, start, start + _AT_ONCE - 1)
        for name in lists:
            text = name.decode() if isinstance(name, bytes) else name
            counts[text] = counts.get(text, 0) + 1
    return counts
