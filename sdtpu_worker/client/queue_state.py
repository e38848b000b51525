"""What lies in the task's queues: how many jobs wait, are held by workers or deferred; and how to purge them.

kombu keeps the jobs of one queue in four Redis lists, one for each band of priorities, and a worker keeps the jobs that
it holds or defers elsewhere. So no single key tells the load: `LLEN sdtpu` sees the most urgent band alone.
"""

from __future__ import annotations

import contextlib
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.admission import messages_ahead
from sdtpu_worker.client.routing import device_queues, reporting_queues
from sdtpu_worker.client.waiting import as_text, read_waiting
from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.load_report import WorkerLoad, estimated_start_s, read_loads
from sdtpu_worker.contract.queues import (
    DEAD_COUNTS_KEY,
    DEFAULT_PRIORITY,
    DELAYED_KEY,
    HELD_KEY,
    LEASES_KEY,
    plain_client,
    shard_queues,
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
        oldest_s: for how many seconds a job that is next has been waiting at most; None where that is not known.
    """

    queue: str
    waiting: Mapping[int, int]
    held: int
    deferred: int
    oldest_s: float | None = None

    @property
    def load(self) -> int:
        """Jobs that wait or are held: what an autoscaler should look at."""
        return sum(self.waiting.values()) + self.held


@dataclass(frozen=True)
class BrokerState:
    """What Redis knows of the task.

    Attributes:
        queues: the state of each queue.
        wait_s: seconds until a new job of the default priority would have a slot, by queue; a queue is left out while
            no worker has published its load.
        workers: the load reports of the workers that are alive.
        dead_letters: how many messages no worker could run, by kind.
        memory: bytes of Redis' memory: `used`, and its `limit` where it has one; empty where Redis does not tell.
    """

    queues: Sequence[QueueState]
    wait_s: Mapping[str, float]
    workers: Sequence[WorkerLoad]
    dead_letters: Mapping[str, int]
    memory: Mapping[str, int]


def read_queues(app: Celery) -> list[QueueState]:
    """Return the state of each of the task's queues; the queues are read one after the other, not at one moment.

    Args:
        app: an app of a client or a worker.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with open_broker(app) as (redis, prefix, queues, bands):
        return _queue_states(redis, prefix, queues, bands)


def read_broker(app: Celery) -> BrokerState:
    """Return the state of the task's queues and of its workers, as `sdtpu metrics` exports it.

    Args:
        app: an app of a client or a worker.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    main = read_setting("sdtpu_queue", app.conf)
    shards = set(shard_queues(main, read_setting("sdtpu_tenant_shards", app.conf)))
    with open_broker(app) as (redis, prefix, queues, bands):
        states = _queue_states(redis, prefix, queues, bands)
        loads = {queue: read_loads(redis, queue, prefix) for queue in reporting_queues(app, queues)}
        memory = _memory_of(redis)
        dead = {as_text(kind): int(count) for kind, count in redis.hgetall(prefix + DEAD_COUNTS_KEY).items()}
    lengths = {state.queue: list(state.waiting.values()) for state in states}
    band = max(0, bisect(bands, DEFAULT_PRIORITY) - 1)
    wait_s = {}
    for queue in queues:
        together = [name for name in queues if name in shards] if queue in shards else [queue]
        workers = loads[main] if queue in shards else loads[queue]
        ahead = messages_ahead({name: lengths[name] for name in together}, queue, band)
        seconds = estimated_start_s(workers, ahead, DEFAULT_PRIORITY, has_deadline=False)
        if seconds is not None:
            wait_s[queue] = seconds
    return BrokerState(states, wait_s, [load for each in loads.values() for load in each], dead, memory)


def _memory_of(redis: Any) -> dict[str, int]:
    from redis.exceptions import ResponseError

    try:
        info = redis.info("memory")
    except ResponseError:  # a user without the right to ask, a service that does not tell
        return {}
    found = {"used": info.get("used_memory"), "limit": info.get("maxmemory") or None}
    return {kind: int(number) for kind, number in found.items() if number is not None}


def _queue_states(
    redis: Any, prefix: str, queues: Mapping[str, Sequence[str]], bands: Sequence[int]
) -> list[QueueState]:
    held = _count_by_list(redis, prefix, LEASES_KEY)
    deferred = _count_by_list(redis, prefix, DELAYED_KEY)
    return [
        QueueState(
            queue,
            waiting.counts,
            sum(held.get(name, 0) for name in queues[queue]),
            sum(deferred.get(name, 0) for name in queues[queue]),
            waiting.oldest_s,
        )
        for queue, waiting in read_waiting(redis, queues, bands).items()
    ]


def purge_queues(app: Celery) -> int:
    """Delete the jobs that wait or are deferred in all of the task's queues; return how many.

    Jobs that workers hold continue. Nothing is stored for the deleted ones: they stay PENDING, as after `celery purge`.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with open_broker(app) as (redis, prefix, queues, _):
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
def broker_with_prefix(app: Celery) -> Iterator[tuple[Any, str]]:
    """Give a client of the broker's Redis for the block, and what every key there begins with.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    with open_broker(app) as (redis, prefix, *_):
        yield redis, prefix


@contextlib.contextmanager
def open_broker(app: Celery) -> Iterator[tuple[Any, str, dict[str, list[str]], Sequence[int]]]:
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


def _count_by_list(redis: Any, prefix: str, tags_key: str) -> dict[str, int]:
    """Return how many messages of a sorted set of tags came from each list."""
    counts: dict[str, int] = {}
    size = redis.zcard(prefix + tags_key)
    for start in range(0, size, _AT_ONCE):
        lists = redis.eval(_LISTS_OF_TAGS, 2, prefix + HELD_KEY, prefix + tags_key, start, start + _AT_ONCE - 1)
        for name in lists:
            counts[as_text(name)] = counts.get(as_text(name), 0) + 1
    return counts
