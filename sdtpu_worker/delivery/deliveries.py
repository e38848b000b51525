"""The messages that this worker holds: claimed, leased, acknowledged and requeued by `sdtpu_worker.delivery.scripts`.

A message whose job is not due yet (`countdown`, `eta`) is deferred: no worker holds it, and the first worker that finds
it due puts it at the front of its queue. Deferred messages therefore take no worker's memory and keep no other job from
a worker, however many there are. (`inspect scheduled` does not list them; `ZCARD sdtpu:delayed` counts them. A worker
looks at revoked jobs when it takes a message, so a revoke holds for a deferred job as it does for a waiting one.)

Beyond the message, Redis keeps two facts of a job by task id (`sdtpu_worker.delivery.job_facts`): `sdtpu:starts:…`, the
hosts on whose devices the job was when they died, hung or were lost, and `sdtpu:snap:…`, its snapshot if a worker
handed it over. Acknowledging the message removes both.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.connection import Connection
from sdtpu_worker.delivery.delivery import Delivery, Move, describe_dead_letter
from sdtpu_worker.delivery.job_facts import JobFacts, read_job_facts
from sdtpu_worker.delivery.keys import Keys

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

MAX_DEAD_LETTERS = 1000
"""How many dead letters Redis keeps; older ones are only counted."""
JOB_FACTS_EXPIRE_S = 24 * 3600
"""Seconds that Redis keeps a job's starts and its snapshot."""
_MAX_MOVES = 200  # messages that one sweep, or one look for due messages, moves


class Deliveries:
    """The messages that this worker holds, over all the connections that it ever had. Any thread.

    `acknowledge` and `requeue` never raise: a move that cannot be sent to Redis now is sent by the next `flush`.

    Args:
        connect: makes a client of the broker's Redis, with time-outs.
        keys: the names of the keys in Redis.
        lease_s: seconds that a message stays this worker's without renewal.
        host: this worker's name.

    Attributes:
        connection: to the broker's Redis.
        on_free: called when a held message has left this worker, so that another one may be taken.
        on_deferred: called with the time, on Redis' clock, at which a message that was just deferred is due.
        on_dead_letter: called with the kind of every message that this worker dead-letters.
        dead_letters, redelivered: messages that this worker dead-lettered, and that its sweeps redelivered.
        aside: ids of jobs that only wait for another one, and keep no other message from this worker.
    """

    def __init__(self, connect: Callable[[], Redis], keys: Keys, lease_s: float, host: str) -> None:
        self.connection, self.keys, self.lease_s = Connection(connect), keys, lease_s
        self._name = f"{host}\n{uuid.uuid4().hex}"  # a restarted worker has the same host name, but another id
        self._lock = threading.Lock()
        self._held: dict[str, Delivery] = {}
        self._unsent_moves: dict[str, Move] = {}  # by tag
        self.on_free: Callable[[], None] = lambda: None
        self.on_deferred: Callable[[float], None] = lambda due_at: None
        self.on_dead_letter: Callable[[str], None] = lambda kind: None
        self.dead_letters = self.redelivered = 0
        self.aside: set[str] = set()

    @property
    def client(self) -> Redis:
        """The client of the broker's Redis; the first use connects.

        Raises:
            Exception: any error of the driver when Redis cannot be reached.
        """
        return self.connection.client()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_places(self) -> int:
        """How many of the held messages count against what this worker may take."""
        if not self.aside:  # asked at each turn of the event loop
            return len(self._held)
        return sum(delivery.task_id not in self.aside for delivery in self._held.copy().values())

    def holds(self, tag: str) -> bool:
        """Return whether this worker holds a message."""
        return tag in self._held

    def is_lost(self, tag: str) -> bool:
        """Return whether the lease of a message has expired and it was redelivered: another worker may have it.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        return not self.client.hexists(self.keys.held, tag)

    def hold(self, tag: str, task_id: str) -> None:
        """Note that this worker has just claimed a message."""
        with self._lock:
            self._held[tag] = Delivery(task_id)

    def mark_running(self, tag: str) -> None:
        """Note that the pool has taken a message's job: a lost connection does not requeue the message."""
        with self._lock:
            if tag in self._held:
                self._held[tag].running = True

    def mark_suspect(self, tag: str) -> None:
        """Note that the devices hung or were lost with this message's job: this start of it counts as a crash."""
        with self._lock:
            if tag in self._held:
                self._held[tag].suspect = True

    def acknowledge(self, tag: str) -> None:
        """Forget a message for good, with all that is kept of its job."""
        self._end_hold(tag, self._acknowledgement)

    def requeue(self, tag: str) -> None:
        """Put a message back at the front of its queue, marked as redelivered; its job's snapshot stays.

        The record that the job was on this worker's devices is removed, unless the job is a suspect or the lease has
        expired.
        """
        self._end_hold(tag, self._requeueing)

    def requeue_waiting(self) -> None:
        """Have the next `flush` requeue the messages whose jobs the pool has not taken: their consumer has ended."""
        self._requeue_later(lambda delivery: not delivery.running)

    def requeue_all(self) -> None:
        """Have the next `flush` requeue every message that this worker holds."""
        self._requeue_later(lambda _: True)

    def release(self, tag: str) -> None:
        """Stop renewing a message, if this worker still holds it: it is redelivered when its lease expires."""
        with self._lock:
            delivery = self._held.pop(tag, None)
        if delivery is not None:
            logger.warning("task %s could not be brought to an end; it is redelivered within %.0f s",
                           delivery.task_id, self.lease_s)  # fmt: skip
            self.on_free()

    def renew(self) -> list[str]:
        """Renew every lease.

        Returns:
            The tags of messages whose lease has expired and which were redelivered. They stay held until their jobs
            end here.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        tags = list(self._held)
        if not tags:
            return []
        gone: Any = self.connection.run(scripts.RENEW, [self.keys.leases], [self.lease_s, *tags])
        return [tag for raw in gone if (tag := raw.decode()) in self._held]  # a job may have ended in the meantime

    def flush(self) -> None:
        """Send Redis the moves that could not be sent before.

        Raises:
            redis.exceptions.RedisError: they cannot be sent now either; the next `flush` tries again.
        """
        for tag, move in list(self._unsent_moves.items()):
            self._send(tag, move)
            self._unsent_moves.pop(tag, None)

    def redis_time(self) -> float:
        """Return the time on Redis' clock, in seconds since 1970.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        seconds, microseconds = self.client.time()
        return seconds + microseconds / 1e6

    def sweep(self, not_after: float = math.inf) -> int:
        """Redeliver the messages whose lease has expired; return how many.

        Args:
            not_after: seconds since 1970; when Redis' clock is past it, nothing is redelivered.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        count: Any = self.connection.run(scripts.SWEEP, [self.keys.held, self.keys.leases], [_MAX_MOVES, not_after])
        if count:
            self.redelivered += count
            logger.warning("%d messages redelivered: their worker has stopped renewing its leases", count)
        return count

    def defer(self, tag: str, due_at: float) -> bool:
        """Keep a message in Redis, held by nobody, until it is due by Redis' clock.

        Args:
            tag: the tag of a message that was just claimed.
            due_at: seconds since 1970.

        Returns:
            Whether the message was deferred, and so is not this worker's any more; False when it is due already.

        Raises:
            redis.exceptions.RedisError: Redis was not reached; the message is redelivered when its lease expires.
        """
        keys = [self.keys.held, self.keys.leases, self.keys.delayed]
        is_deferred = bool(self.connection.run(scripts.DEFER, keys, [tag, due_at]))
        if is_deferred:
            self.on_deferred(due_at)
        return is_deferred

    def requeue_due(self) -> float | None:
        """Put deferred messages that are due at the front of their queues.

        Returns:
            The seconds until the next deferred message is due; None when there is none.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        next_s = self.connection.run(scripts.REQUEUE_DUE, [self.keys.held, self.keys.delayed], [_MAX_MOVES])
        return None if next_s is None else float(next_s)

    def dead_letter(self, tag: str, kind: str, queue: str, reason: str, size: int, message: bytes) -> None:
        """Remove a message that cannot be run: count it, and keep it among the last dead letters.

        Args:
            tag: the tag of a message that was just claimed and is not held yet.
            kind: the name that it is counted by.
            queue: the queue that it came from.
            reason: why it cannot be run.
            size: its size in bytes.
            message: as much of it as was read.

        Raises:
            redis.exceptions.RedisError: Redis was not reached; the message is redelivered when its lease expires.
        """
        letter = describe_dead_letter(time.time(), kind, queue, reason, size, message)
        keys = [self.keys.held, self.keys.leases, self.keys.dead, self.keys.dead_counts]
        self.connection.run(scripts.DEAD_LETTER, keys, [tag, kind, letter, MAX_DEAD_LETTERS - 1])
        self.dead_letters += 1
        self.on_dead_letter(kind)

    def record_starts(self, task_ids: Sequence[str], alone: bool = False) -> None:
        """Record that these jobs are on this worker's devices from now on, in case the worker dies with them.

        Args:
            task_ids: the jobs.
            alone: no other job is on the devices. The records of jobs that were on them and have left are removed:
                these jobs are not the cause if the worker dies now.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        with self._lock:
            held = list(self._held.items())
        starts = {tag: self.keys.starts(delivery.task_id) for tag, delivery in held}
        starting = [tag for tag, delivery in held if delivery.task_id in task_ids]
        left = [tag for tag in starts if alone and tag not in starting]
        keys = [self.keys.held, *(starts[tag] for tag in (*starting, *left))]
        self.connection.run(scripts.RECORD_STARTS, keys, [self._name, JOB_FACTS_EXPIRE_S, *starting])

    def job_facts(self, task_id: str) -> JobFacts:
        """Return what earlier workers left of a job.

        Raises:
            redis.exceptions.RedisError: Redis was not reached.
        """
        return read_job_facts(self.client, self.keys, task_id)

    def save_snapshot(self, task_id: str, data: bytes) -> None:
        """Keep a job's snapshot for the worker that continues it, unless another one has taken the job over already.

        Raises:
            redis.exceptions.RedisError: Redis was not reached, or refused the snapshot.
        """
        with self._lock:
            tags = [tag for tag, delivery in self._held.items() if delivery.task_id == task_id]
        for tag in tags:
            keys = [self.keys.held, self.keys.snapshot(task_id)]
            if self.connection.run(scripts.SAVE_SNAPSHOT, keys, [tag, data, JOB_FACTS_EXPIRE_S]):
                return

    def _requeue_later(self, wanted: Callable[[Delivery], bool]) -> None:
        """Stop holding the wanted messages; the next `flush` requeues them."""
        with self._lock:
            for tag in [tag for tag, delivery in self._held.items() if wanted(delivery)]:
                self._unsent_moves[tag] = self._requeueing(self._held.pop(tag))

    def _end_hold(self, tag: str, move_of: Callable[[Delivery], Move]) -> None:
        """Stop holding a message, and move it in Redis now, or with the next `flush` if Redis cannot be reached."""
        with self._lock:
            delivery = self._held.pop(tag, None)
        if delivery is None:
            return
        move = move_of(delivery)
        try:
            self._send(tag, move)
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.warning("Redis could not be told yet that task %s has ended here; trying again: %s",
                           delivery.task_id, exc)  # fmt: skip
            self._unsent_moves[tag] = move
        self.on_free()

    def _acknowledgement(self, delivery: Delivery) -> Move:
        return Move(scripts.ACKNOWLEDGE, (self.keys.starts(delivery.task_id), self.keys.snapshot(delivery.task_id)))

    def _requeueing(self, delivery: Delivery) -> Move:
        """Return the move back to the queue; the starts of a suspect's job are left alone."""
        return Move(scripts.REQUEUE, () if delivery.suspect else (self.keys.starts(delivery.task_id),))

    def _send(self, tag: str, move: Move) -> None:
        self.connection.run(move.script, [self.keys.held, self.keys.leases, *move.job_keys], [tag, self._name])
