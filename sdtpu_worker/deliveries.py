"""The messages that this worker holds: claimed, leased, acknowledged and given back by atomic scripts in Redis.

A message lies in exactly one place: in its queue's list, or in the hash of held messages with its lease in a sorted
set, or nowhere, when it was acknowledged. Every move between them is one Lua script, so that no moment exists in which
a dying worker takes a message with it. A lease is the time, on Redis' own clock, at which the message goes back to its
queue unless its holder has renewed it.

A message that is not due yet (`countdown`, `eta`) is nobody's: it has its time in another sorted set instead of a
lease, and the first worker that notices it is due puts it at the front of its queue. So however many there are, they
take no worker's memory and keep no other job from it. (`inspect scheduled` does not know them; `ZCARD sdtpu:delayed`
does. A revoke holds as it does for any job that waits in a queue: it is looked up when a worker takes the job.)

The keys, all below kombu's `global_keyprefix` and `sdtpu:`: `unacked`, `unacked_index`, `delayed`, `dead`,
`dead:counts`, `starts:<task id>`, `snap:<task id>`. The scripts touch these and the queues' lists.

What is kept of a job beyond its message, by task id: `sdtpu:starts:…`, the hosts on whose devices it was when they
died, hung or were lost, and `sdtpu:snap:…`, its state if a worker handed it over. Both go when it is acknowledged.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

REDELIVERED = b" "
"""Stands before a message that was held before, once for every holder that died: JSON ignores spaces."""
MAX_DEAD_LETTERS = 1000
DEAD_LETTER_BYTES = 4096
JOB_FACTS_EXPIRE_S = 24 * 3600
_SWEEP_LIMIT = 200

CLAIM = """
for i = 3, #KEYS do
    local message = redis.call('RPOP', KEYS[i])
    if message then
        local now = redis.call('TIME')
        redis.call('HSET', KEYS[1], ARGV[1], KEYS[i] .. '\\n' .. message)
        redis.call('ZADD', KEYS[2], now[1] + now[2] / 1e6 + ARGV[2], ARGV[1])
        if #message <= tonumber(ARGV[3]) then return {i - 3, message} end
        return {i - 3, #message, string.sub(message, 1, ARGV[4]), string.sub(message, -ARGV[4])}
    end
end
redis.call('EXISTS', unpack(KEYS, 3))
return false
"""
"""Take the first message that there is and record it as held.

KEYS: held, leases, then the lists to look at in this order. ARGV: a tag, the lease in seconds, the size up to which a
message is read whole, the bytes to read of both ends of a larger one. Returns the list's number and the message, or
the number, the size and both ends, or nothing. (The last call only reads: it makes Redis remember the lists, so that
`CLIENT TRACKING` tells when one of them is written to.)"""

_ACK = """
for _, tag in ipairs(ARGV) do
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
end
for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
"""
_GIVE_BACK = """
local function give_back(tag, holder_died)
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local list, message = string.match(record, '^([^\\n]*)\\n(.*)$')
        if holder_died or string.sub(message, 1, 1) ~= ' ' then message = ' ' .. message end
        redis.call('HDEL', KEYS[1], tag)
        redis.call('RPUSH', list, message)
    end
    redis.call('ZREM', KEYS[2], tag)
    return record
end
"""
# A full Redis (maxmemory) refuses a script whose first write may need memory; so what frees some comes first.
_RELEASE = f"""{_GIVE_BACK}
if give_back(ARGV[1], false) then
    for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
end
"""
_RENEW = """
local now, gone = redis.call('TIME'), {}
redis.call('ZREM', KEYS[1], '')
local ends = now[1] + now[2] / 1e6 + ARGV[1]
for i = 2, #ARGV do
    if redis.call('ZSCORE', KEYS[1], ARGV[i]) then redis.call('ZADD', KEYS[1], ends, ARGV[i])
    else gone[#gone + 1] = ARGV[i] end
end
return gone
"""
_SWEEP = f"""{_GIVE_BACK}
local now = redis.call('TIME')
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now[1] + now[2] / 1e6, 'LIMIT', 0, ARGV[1])
for _, tag in ipairs(tags) do give_back(tag, true) end
return #tags
"""
_DELAY = """
local now = redis.call('TIME')
if tonumber(ARGV[2]) <= now[1] + now[2] / 1e6 or redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
return 1
"""
_BRING_DUE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
for i = #tags, 1, -1 do
    local record = redis.call('HGET', KEYS[1], tags[i])
    if record then
        local list, message = string.match(record, '^([^\\n]*)\\n(.*)$')
        redis.call('HDEL', KEYS[1], tags[i])
        redis.call('RPUSH', list, message)
    end
    redis.call('ZREM', KEYS[2], tags[i])
end
local next = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {#tags, next[2] and tostring(math.max(0, next[2] - now)) or false}
"""
"""Those that are due earliest come to stand first."""
_BURY = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[4], ARGV[2], 1)
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('LTRIM', KEYS[3], 0, ARGV[4])
"""


@dataclass(frozen=True)
class Keys:
    """Where everything is; `prefix` is kombu's `global_keyprefix`."""

    prefix: str = ""

    @property
    def held(self) -> str:
        """A hash: by tag, the list that a message came from, a line feed, the message."""
        return f"{self.prefix}sdtpu:unacked"

    @property
    def leases(self) -> str:
        """A sorted set: tags by the time, in seconds, at which their lease ends."""
        return f"{self.prefix}sdtpu:unacked_index"

    @property
    def delayed(self) -> str:
        """A sorted set: tags of messages that nobody holds by the time, in seconds, at which they are due."""
        return f"{self.prefix}sdtpu:delayed"

    @property
    def dead(self) -> str:
        """A list of JSON: the last messages that were put aside, and why."""
        return f"{self.prefix}sdtpu:dead"

    @property
    def dead_counts(self) -> str:
        """A hash: how many messages were put aside, by kind of reason."""
        return f"{self.prefix}sdtpu:dead:counts"

    def starts(self, task_id: str) -> str:
        """A list: the hosts on whose devices a job was."""
        return f"{self.prefix}sdtpu:starts:{task_id}"

    def snapshot(self, task_id: str) -> str:
        """A string: the state of a job that was handed over."""
        return f"{self.prefix}sdtpu:snap:{task_id}"


@dataclass
class Delivery:
    """A message that this worker holds; `running` when the pool has it, `task_id` once it was read.

    `suspect`: its job was on devices that hung or were lost, perhaps by its fault.
    """

    task_id: str = ""
    running: bool = False
    suspect: bool = False


@dataclass(frozen=True)
class JobFacts:
    """What earlier workers left of a job: the hosts that died with it on their devices, and its state."""

    died_on: Sequence[str] = ()
    snapshot: bytes | None = None


class Deliveries:
    """What this worker holds, whatever becomes of the connection that it came on. Any thread.

    Acknowledging and giving back never fail: what Redis cannot be told now is told by the next `flush`.

    Args:
        connect: makes a client of the broker's Redis, with time-outs.
        keys: where everything is.
        lease_s: how long a message is ours without renewal.
        host: this worker's name.
    """

    def __init__(self, connect: Callable[[], Redis], keys: Keys, lease_s: float, host: str) -> None:
        self._connect, self.keys, self.lease_s, self.host = connect, keys, lease_s, host
        self._lock, self._connecting = threading.Lock(), threading.Lock()
        self._client: Redis | None = None
        self._held: dict[str, Delivery] = {}
        self._acks: dict[str, str] = {}  # that Redis could not be told yet: tag and task
        self._releases: dict[str, str] = {}
        self._suspected: dict[str, str] = {}
        self.on_free: Callable[[], None] = lambda: None
        self.dead_letters = 0
        self.redelivered = 0

    @property
    def client(self) -> Redis:
        """The client; connects at first use.

        Raises:
            Exception: what the driver raises when Redis is not there.
        """
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def close(self) -> None:
        """Close the connections."""
        with self._connecting:
            if self._client is not None:
                self._client.connection_pool.disconnect()
                self._client = None

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, tag: str, task_id: str) -> None:
        """Know a message as ours that was just claimed."""
        with self._lock:
            self._held[tag] = Delivery(task_id)

    def run(self, tag: str) -> None:
        """Know that the pool has it: a lost connection does not end it."""
        with self._lock:
            if tag in self._held:
                self._held[tag].running = True

    def suspect(self, tag: str) -> None:
        """Know that the devices hung or were lost with this job: it counts as a crash."""
        with self._lock:
            if tag in self._held:
                self._held[tag].suspect = True

    def ack(self, tag: str) -> None:
        """Forget a message for good, with what is kept of its job."""
        self._end(tag, self._acks, self._tell_ack)

    def release(self, tag: str) -> None:
        """Give a message back to the front of its queue, marked as redelivered; its job's state stays.

        That it was on these devices is forgotten, unless it is a suspect or its lease has ended.
        """
        delivery = self._held.get(tag)
        if delivery is not None and delivery.suspect:
            self._end(tag, self._suspected, self._tell_suspected)
        else:
            self._end(tag, self._releases, self._tell_release)

    def release_waiting(self) -> None:
        """Have the next `flush` give back what the pool does not have: its consumer is gone."""
        self._release_later(lambda delivery: not delivery.running)

    def release_all(self) -> None:
        """Have the next `flush` give everything back."""
        self._release_later(lambda _: True)

    def let_go(self, tag: str) -> None:
        """Stop renewing a message: another worker gets it when its lease ends."""
        with self._lock:
            delivery = self._held.pop(tag, None)
        if delivery is not None:
            logger.warning("task %s could not be brought to an end; it is redelivered within %.0f s",
                           delivery.task_id, self.lease_s)  # fmt: skip
            self.on_free()

    def renew(self) -> list[str]:
        """Renew every lease; return the tags that are not ours any more (they stay held until their jobs end).

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        tags = list(self._held)
        if not tags:
            self.client.ping()
            return []
        gone: Any = self._eval(_RENEW, [self.keys.leases], [self.lease_s, *tags])
        return [tag for raw in gone if (tag := raw.decode()) in self._held]  # others have ended meanwhile

    def flush(self) -> None:
        """Tell Redis what it could not be told before.

        Raises:
            redis.exceptions.RedisError: it cannot be told now either.
        """
        for pending, tell in (
            (self._acks, self._tell_ack),
            (self._releases, self._tell_release),
            (self._suspected, self._tell_suspected),
        ):
            for tag, task_id in list(pending.items()):
                tell(tag, task_id)
                pending.pop(tag, None)

    def sweep(self) -> int:
        """Put the messages whose lease has ended back into their queues; return how many.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        count: Any = self._eval(_SWEEP, [self.keys.held, self.keys.leases], [_SWEEP_LIMIT])
        if count:
            self.redelivered += count
            logger.warning("%d messages of a worker that does not answer any more are back in their queues", count)
        return count

    def delay(self, tag: str, due_at: float) -> bool:
        """Put a message aside until it is due, on Redis' own clock; return whether it is not due yet.

        Args:
            tag: of a message that was just claimed; if True, it is not ours any more.
            due_at: seconds since 1970.

        Raises:
            redis.exceptions.RedisError: Redis was not reached; the message comes again when its lease ends.
        """
        return bool(self._eval(_DELAY, [self.keys.held, self.keys.leases, self.keys.delayed], [tag, due_at]))

    def bring_due(self) -> float | None:
        """Put the messages that are due at the front of their queues; return the seconds until the next one.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        _, next_s = self._eval(_BRING_DUE, [self.keys.held, self.keys.delayed], [_SWEEP_LIMIT])
        return None if next_s is None else float(next_s)

    def bury(self, tag: str, kind: str, queue: str, reason: str, size: int, message: bytes) -> None:
        """Put a message aside that cannot be run: it is counted, and the last ones are kept.

        Args:
            tag: of a message that was just claimed; it is not held any more.
            kind: what it is counted as.
            queue: where it was.
            reason: why it cannot be run.
            size: in bytes.
            message: as much of it as was read.

        Raises:
            redis.exceptions.RedisError: Redis was not reached; the message comes again when its lease ends.
        """
        letter = {
            "at": round(time.time(), 3),
            "queue": queue,
            "kind": kind,
            "reason": reason,
            "bytes": size,
            "message": message[:DEAD_LETTER_BYTES].decode(errors="backslashreplace"),
        }
        keys = [self.keys.held, self.keys.leases, self.keys.dead, self.keys.dead_counts]
        self._eval(_BURY, keys, [tag, kind, json.dumps(letter), MAX_DEAD_LETTERS - 1])
        self.dead_letters += 1

    def record_starts(self, task_ids: Sequence[str], alone: bool = False) -> None:
        """Write down that these jobs are on this host's devices now, in case it dies of one.

        Args:
            task_ids: the jobs.
            alone: no other job is: those that are stored and acknowledged only are not to blame any more.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        with self.client.pipeline() as pipe:
            for key in map(self.keys.starts, task_ids):
                pipe.rpush(key, self.host)
                pipe.expire(key, JOB_FACTS_EXPIRE_S)
            if alone:
                with self._lock:
                    others = {delivery.task_id for delivery in self._held.values()}.difference(task_ids)
                for key in map(self.keys.starts, others):
                    pipe.lrem(key, -1, self.host)
            pipe.execute()
        with self._lock:
            ended = set(task_ids).difference(delivery.task_id for delivery in self._held.values())
        for key in map(self.keys.starts, ended):  # Redis was slow and they quick: acknowledged before this was written
            self.client.lrem(key, -1, self.host)

    def job_facts(self, task_id: str) -> JobFacts:
        """Return what earlier workers left of a job.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        with self.client.pipeline(transaction=False) as pipe:
            pipe.lrange(self.keys.starts(task_id), 0, -1)
            pipe.get(self.keys.snapshot(task_id))
            hosts, snapshot = pipe.execute()
        return JobFacts([host.decode(errors="replace") for host in hosts], snapshot)

    def save_snapshot(self, task_id: str, data: bytes) -> None:
        """Keep a job's state for whoever gets it next.

        Raises:
            redis.exceptions.RedisError: Redis did not take it.
        """
        self.client.set(self.keys.snapshot(task_id), data, ex=JOB_FACTS_EXPIRE_S)

    def _release_later(self, wanted: Callable[[Delivery], bool]) -> None:
        with self._lock:
            for tag in [tag for tag, delivery in self._held.items() if wanted(delivery)]:
                delivery = self._held.pop(tag)
                (self._suspected if delivery.suspect else self._releases)[tag] = delivery.task_id

    def _end(self, tag: str, untold: dict[str, str], tell: Callable[[str, str], None]) -> None:
        with self._lock:
            delivery = self._held.pop(tag, None)
        if delivery is None:
            return
        try:
            tell(tag, delivery.task_id)
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.warning("Redis could not be told the end of task %s yet: %s", delivery.task_id, exc)
            untold[tag] = delivery.task_id
        self.on_free()

    def _tell_ack(self, tag: str, task_id: str) -> None:
        facts = [self.keys.starts(task_id), self.keys.snapshot(task_id)]
        self._eval(_ACK, [self.keys.held, self.keys.leases, *facts], [tag])

    def _tell_release(self, tag: str, task_id: str) -> None:
        self._eval(_RELEASE, [self.keys.held, self.keys.leases, self.keys.starts(task_id)], [tag])

    def _tell_suspected(self, tag: str, task_id: str) -> None:
        self._eval(_RELEASE, [self.keys.held, self.keys.leases], [tag])

    def _eval(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return self.client.eval(script, len(keys), *keys, *args)
