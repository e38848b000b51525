"""The messages that this worker holds: claimed, leased, acknowledged and given back by `sdtpu_worker.delivery.scripts`.

A message that is not due yet (`countdown`, `eta`) is nobody's: the first worker that notices it is due puts it at the
front of its queue. So however many there are, they take no worker's memory and keep no other job from it. (`inspect
scheduled` does not know them; `ZCARD sdtpu:delayed` does. A revoke holds as it does for any job that waits in a queue:
it is looked up when a worker takes the job.)

What is kept of a job beyond its message, by task id: `sdtpu:starts:…`, the hosts on whose devices it was when they
died, hung or were lost, and `sdtpu:snap:…`, its state if a worker handed it over. Both go when it is acknowledged.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery import scripts

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

MAX_DEAD_LETTERS = 1000
DEAD_LETTER_BYTES = 4096
JOB_FACTS_EXPIRE_S = 24 * 3600
MAX_SNAPSHOT_BYTES = 2**26
"""Of a job's state, deflated. One of 1024 x 1024 pixels has about 2 MB; without a bound a forged one fills memory."""
_MAX_STARTS, _MAX_NAME_BYTES = 10_000, 512
_SWEEP_LIMIT = 200


@dataclass
class Delivery:
    """A message that this worker holds.

    Attributes:
        task_id: of its job.
        running: the pool has it.
        suspect: its job was on devices that hung or were lost, perhaps by its fault.
    """

    task_id: str = ""
    running: bool = False
    suspect: bool = False


@dataclass(frozen=True)
class Ending:
    """How a message stops being ours: the script that says so to Redis, and the keys of its job that it needs."""

    script: str
    keys: Sequence[str]


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

    def __init__(self, connect: Callable[[], Redis], keys: scripts.Keys, lease_s: float, host: str) -> None:
        self._connect, self.keys, self.lease_s = connect, keys, lease_s
        self._name = f"{host}\n{uuid.uuid4().hex}"  # a worker that is started again has its host's name, not this one
        self._lock, self._connecting = threading.Lock(), threading.Lock()
        self._client: Redis | None = None
        self._held: dict[str, Delivery] = {}
        self._untold: dict[str, Ending] = {}  # what Redis could not be told yet, by tag
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
        self._end(tag, self._acked)

    def release(self, tag: str) -> None:
        """Give a message back to the front of its queue, marked as redelivered; its job's state stays.

        That it was on our devices is forgotten, unless it is a suspect or its lease has ended.
        """
        self._end(tag, self._released)

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
            return []
        gone: Any = self._eval(scripts.RENEW, [self.keys.leases], [self.lease_s, *tags])
        return [tag for raw in gone if (tag := raw.decode()) in self._held]  # others have ended meanwhile

    def flush(self) -> None:
        """Tell Redis what it could not be told before.

        Raises:
            redis.exceptions.RedisError: it cannot be told now either.
        """
        for tag, ending in list(self._untold.items()):
            self._tell(tag, ending)
            self._untold.pop(tag, None)

    def sweep(self) -> int:
        """Put the messages whose lease has ended back into their queues; return how many.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        count: Any = self._eval(scripts.SWEEP, [self.keys.held, self.keys.leases], [_SWEEP_LIMIT])
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
        return bool(self._eval(scripts.DELAY, [self.keys.held, self.keys.leases, self.keys.delayed], [tag, due_at]))

    def bring_due(self) -> float | None:
        """Put the messages that are due at the front of their queues; return the seconds until the next one.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        next_s = self._eval(scripts.BRING_DUE, [self.keys.held, self.keys.delayed], [_SWEEP_LIMIT])
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
        self._eval(scripts.BURY, keys, [tag, kind, json.dumps(letter), MAX_DEAD_LETTERS - 1])
        self.dead_letters += 1

    def record_starts(self, task_ids: Sequence[str], alone: bool = False) -> None:
        """Write down that these jobs are on this host's devices now, in case it dies of one.

        Args:
            task_ids: the jobs.
            alone: no other job is: those that were, and have left them for now, are not to blame if it dies.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        with self._lock:
            held = list(self._held.items())
        starts = {tag: self.keys.starts(delivery.task_id) for tag, delivery in held}
        starting = [tag for tag, delivery in held if delivery.task_id in task_ids]
        others = [tag for tag in starts if alone and tag not in starting]
        keys = [self.keys.held, *(starts[tag] for tag in (*starting, *others))]
        self._eval(scripts.RECORD, keys, [self._name, JOB_FACTS_EXPIRE_S, *starting])

    def job_facts(self, task_id: str) -> JobFacts:
        """Return what earlier workers left of a job.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        with self.client.pipeline(transaction=False) as pipe:
            pipe.lrange(self.keys.starts(task_id), 0, _MAX_STARTS - 1)
            pipe.getrange(self.keys.snapshot(task_id), 0, MAX_SNAPSHOT_BYTES)
            names, snapshot = pipe.execute()
        cut = (name[:_MAX_NAME_BYTES].decode(errors="replace") for name in dict.fromkeys(names))
        hosts = [name.partition("\n")[0] for name in cut]
        if len(snapshot) > MAX_SNAPSHOT_BYTES:
            logger.warning("the state of task %s has more than %d bytes, it starts anew", task_id, MAX_SNAPSHOT_BYTES)
            snapshot = b""
        return JobFacts(hosts, snapshot or None)

    def save_snapshot(self, task_id: str, data: bytes) -> None:
        """Keep a job's state for whoever gets it next.

        Raises:
            redis.exceptions.RedisError: Redis did not take it.
        """
        self.client.set(self.keys.snapshot(task_id), data, ex=JOB_FACTS_EXPIRE_S)

    def _release_later(self, wanted: Callable[[Delivery], bool]) -> None:
        with self._lock:
            for tag in [tag for tag, delivery in self._held.items() if wanted(delivery)]:
                self._untold[tag] = self._released(self._held.pop(tag))

    def _end(self, tag: str, ending_of: Callable[[Delivery], Ending]) -> None:
        with self._lock:
            delivery = self._held.pop(tag, None)
        if delivery is None:
            return
        ending = ending_of(delivery)
        try:
            self._tell(tag, ending)
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.warning("Redis could not be told the end of task %s yet: %s", delivery.task_id, exc)
            self._untold[tag] = ending
        self.on_free()

    def _acked(self, delivery: Delivery) -> Ending:
        return Ending(scripts.ACK, (self.keys.starts(delivery.task_id), self.keys.snapshot(delivery.task_id)))

    def _released(self, delivery: Delivery) -> Ending:
        return Ending(scripts.RELEASE, () if delivery.suspect else (self.keys.starts(delivery.task_id),))

    def _tell(self, tag: str, ending: Ending) -> None:
        self._eval(ending.script, [self.keys.held, self.keys.leases, *ending.keys], [tag, self._name])

    def _eval(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return self.client.eval(script, len(keys), *keys, *args)
