"""A worker process as far as delivery goes: the package's own channel, deliveries, lease and job, in virtual time.

Its threads are actors: `main` claims and hands messages out, `lease` pulses, and each job has one of its own. What is
not the package's stands in for Celery: the loop that reconnects, and the few lines in which a task's end is stored and
its message acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from functools import partial
from queue import Empty
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import redis
from kombu import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery import transport
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.device_loop.submission import JobHandedOver
from sdtpu_worker.errors import DeliveryLimitExceeded
from sdtpu_worker.worker.job import DeviceJob
from sdtpu_worker.worker.job_ends import JobLeft
from tests.histories.actors import Actor
from tests.histories.messages import QUEUE, TASK
from tests.histories.virtual_redis import make_pool

if TYPE_CHECKING:
    from tests.histories.world import World

LEASE_S = 6.0  # a pulse each second is then the slowest that a lease allows
BRIEF_S = LEASE_S / 3
"""A pause, or a step of Redis' clock, of fewer seconds is none: leases are renewed that often."""
LOOK_S = 1.5  # how often an idle worker claims, unless the scheduler runs it before
PREFETCH = 3
MAX_DELIVERIES = 3
PARAMETERS = GenerationRequest.parse(("x",), {"seed": 1})


class VirtualChannel(transport.Channel):
    """The package's channel, on the connections of its process; `main` asks it to look whenever it runs."""

    process: WorkerProcess

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wake_up: Any = SimpleNamespace(tracks=lambda _: True, track=lambda _: None, read=lambda: None)

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        return make_pool(self.process, self.process.world.socket)


class WorkerProcess:
    """A worker process, from its start until it is killed or has stopped.

    Args:
        world: what there is beside it.
        host: the worker's name; a restarted worker has the same.

    Attributes:
        is_paused: nothing of it runs (SIGSTOP, or a suspended machine).
        is_suspended: while it is paused its monotonic clock stands still.
        is_hung: its devices make no progress.
        is_stopping: it got a SIGTERM.
        has_left: it has stopped in good order, so far as Redis could be told.
        tasks: by tag, of the messages that it got.
        is_cut_off: none of its commands reaches Redis.
        paused_at: when, in true time, it was paused.
        suspended_s: how long its monotonic clock stood still.
        wall_ahead_s: how far its wall clock is ahead of true time.
        started_at: in true time.
        away, hung: when, in true time, it was paused or cut off, and its devices made no progress: from, until.
    """

    def __init__(self, world: World, host: str) -> None:
        self.world, self.host = world, host
        self.is_dead = self.is_paused = self.is_suspended = self.is_cut_off = False
        self.is_hung = self.is_stopping = self.has_left = False
        self.tasks: dict[str, str] = {}
        self.suspended_s = self.wall_ahead_s = 0.0
        self.paused_at = 0.0
        self.started_at = world.now
        self.away: list[tuple[float, float]] = []
        self.hung: list[tuple[float, float]] = []
        self.actors: dict[str, Actor] = {}
        self.wake_at: dict[str, float] = {}  # by actor, on the monotonic clock
        self.deliveries = Deliveries(self._connect, Keys(), LEASE_S, host)
        self._pool = make_pool(self, world.socket)
        self._lease = Lease(self.deliveries, lambda: not self.is_hung, clock=self.monotonic)
        intake = Intake(
            deliveries=self.deliveries,
            is_task_queue=lambda queue: queue == QUEUE,
            known_tasks={TASK},
            max_message_bytes=10_000,
            max_holders=10 * MAX_DELIVERIES,
            on_bad=world.on_bad,
            devices_make_progress=lambda: not self.is_hung,
            on_reply=lambda error: None,
        )
        channel = type("Channel", (VirtualChannel,), {"process": self})
        self._transport = type("Transport", (transport.Transport,), {"intake": intake, "Channel": channel})
        self._spawn("lease", self._pulse)
        self._spawn("main", self._consume)

    def monotonic(self) -> float:
        """Return its monotonic clock, in seconds."""
        return self.world.now - self.suspended_s

    def wall(self) -> float:
        """Return its wall clock, in seconds since 1970."""
        return self.world.now + self.wall_ahead_s

    def kill(self) -> None:
        """End it: SIGKILL."""
        self.is_dead = True
        for actor in list(self.actors.values()):
            actor.kill()
        self._pool.disconnect()

    def stop(self) -> None:
        """Have it stop: SIGTERM."""
        if not self.is_stopping:
            self.is_stopping = True
            self._spawn("stop", self._leave)

    def go_away(self, periods: list[tuple[float, float]]) -> None:
        """Take note that it is away from now on, if it is not already."""
        if not periods or periods[-1][1] < math.inf:
            periods.append((self.world.now, math.inf))

    def come_back(self) -> None:
        """Take note that it is away no more, unless it is in another way."""
        if not (self.is_paused or self.is_cut_off or self.is_hung):
            for periods in (self.away, self.hung):
                periods[:] = [(since, min(until, self.world.now)) for since, until in periods]

    def away_alone_s(self, other: WorkerProcess) -> float:
        """Return for how long it was away just now while another worker was not, in seconds."""
        now, longest_s = self.world.now, 0.0
        for periods in (self.away, self.hung):
            if not periods or now - periods[-1][1] > BRIEF_S:
                continue  # it is back, and has had the time to renew its leases
            alone_s = 0.0
            for begin, end in periods:
                begin, end = max(begin, other.started_at, now - LEASE_S - BRIEF_S), min(end, now)
                both_s = sum(max(0.0, min(end, until) - max(begin, since)) for since, until in other.away)
                alone_s += max(0.0, end - begin - both_s)
            longest_s = max(longest_s, alone_s)
        return longest_s

    def runnable(self) -> list[str]:
        """Return the names of the actors that can run."""
        return [] if self.is_dead or self.is_paused else [n for n, actor in self.actors.items() if not actor.is_done]

    def due_at(self, name: str) -> float:
        """Return the true time from which an actor has something to do; at once where it is within an operation."""
        if not self.actors[name].is_idle:
            return self.world.now
        return self.world.now + max(0.0, self.wake_at.get(name, 0.0) - self.monotonic())

    def _connect(self) -> redis.Redis:
        return redis.Redis(connection_pool=self._pool)

    def _spawn(self, name: str, body: Callable[[], None]) -> None:
        self.actors[name] = Actor(name, body, self)

    def sleep(self, seconds: float) -> None:
        """Wait on the monotonic clock. An actor's thread."""
        actor = Actor.current
        assert actor is not None
        until = self.wake_at[actor.name] = self.monotonic() + seconds
        actor.idle()
        while self.monotonic() < until - 1e-6:
            actor.idle()

    def _pulse(self) -> None:
        while "stop" not in self.actors or not self.actors["stop"].is_done:
            self._lease.pulse()
            self.sleep(self._lease._pulse_s())

    def _consume(self) -> None:
        while not self.is_stopping:
            with contextlib.suppress(RedisConnectionError):
                self._consume_on(Connection("redis://", transport=self._transport))
            self.sleep(1.0)

    def _consume_on(self, connection: Connection) -> None:
        """Claim from a new connection until it breaks."""
        channel = connection.transport.create_channel(connection.transport.establish_connection())
        try:
            channel.client.connection = channel.client.connection_pool.get_connection()  # as kombu's poller does
            channel.basic_qos(0, PREFETCH, False)
            channel.basic_consume(QUEUE, False, self._on_message, "tag")
            while not self.is_stopping:
                if channel.qos.can_consume():
                    channel._schedule.on_notice()
                    channel._brpop_start()
                    with contextlib.suppress(Empty):
                        channel._brpop_read()
                self.sleep(LOOK_S)
        finally:
            channel.qos.restore_unacked_once()
            channel._disconnect_pools()

    def _on_message(self, message: Any) -> None:
        task_id = self.tasks[message.delivery_tag] = message.headers["id"]
        self.deliveries.mark_running(message.delivery_tag)
        self._spawn(f"job-{task_id}-{len(self.tasks)}", partial(self._run_job, message, task_id))

    def _run_job(self, message: Any, task_id: str) -> None:
        """Do what the pool, Celery and `run_job` do with a message."""
        job = _Job(self, _Request(self, message, task_id))
        try:
            if left := job.find_early_end():
                raise left
            with job.in_celerys_words():
                facts = job.recall(PARAMETERS)
                self.world.on_recall(task_id, facts, message.delivery_tag)
                self._record_start(task_id)
                self._be_on_devices(self.world.job_s[task_id])
            self._store(task_id, "SUCCESS")
        except JobLeft as left:
            job.leave(left)
        except DeliveryLimitExceeded:
            self._store(task_id, "FAILURE")
        job.request.acknowledge()
        job.release()

    def _be_on_devices(self, seconds: float) -> None:
        """Take the job's time, unless the worker stops.

        Raises:
            JobHandedOver: it does.
        """
        until = self.monotonic() + seconds
        while self.is_hung or self.monotonic() < until - 1e-6:
            if self.is_stopping:
                raise JobHandedOver(SimpleNamespace(to_bytes=lambda: b"steps"))
            self.sleep(min(1.0, max(0.1, until - self.monotonic())))

    def _leave(self) -> None:
        """Do what a worker does at its end: wait for its jobs, then requeue what it still holds."""
        while self.runnable() != ["stop"] and any(name.startswith(("job", "main")) for name in self.runnable()):
            self.sleep(0.5)
        self.deliveries.requeue_all()
        with contextlib.suppress(RedisConnectionError):
            self.deliveries.flush()
        self.has_left = True

    def _record_start(self, task_id: str) -> None:
        """Do what the recorder of starts does: a Redis that cannot be reached is not waited for."""
        with contextlib.suppress(RedisConnectionError):
            self.deliveries.record_starts([task_id])

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        """Return what is stored of a task, as Celery's result backend does."""
        raw = self._patiently(lambda client: client.get(f"celery-task-meta-{task_id}"))
        return json.loads(raw) if raw else {"status": "PENDING", "result": None}

    def _store(self, task_id: str, status: str) -> None:
        """Store a task's end, as Celery's result backend does: not over a success."""
        if self.get_task_meta(task_id)["status"] != "SUCCESS":
            text = json.dumps({"status": status, "result": None})
            self._patiently(lambda client: client.set(f"celery-task-meta-{task_id}", text))
            self.world.on_stored(task_id, status)

    def _patiently(self, ask: Callable[[redis.Redis], Any]) -> Any:
        """Ask until Redis answers, as a thread that runs jobs does."""
        while True:
            try:
                return ask(self.deliveries.client)
            except RedisConnectionError:
                self.sleep(1.0)


class _Request:
    """As much of `DeviceRequest` as a job needs; it acknowledges or requeues once."""

    chord = expires = None
    ignore_result = is_requeued = had_its_slot = False

    def __init__(self, process: WorkerProcess, message: Any, task_id: str) -> None:
        self.id, self.message, self.delivery_info = task_id, message, message.delivery_info
        self.task = SimpleNamespace(backend=process)
        self.stamps: dict[str, Any] = {}
        self._is_acknowledged = False

    def acknowledge(self) -> None:
        if not self._is_acknowledged:
            self._is_acknowledged = True
            self.message.reject(requeue=True) if self.is_requeued else self.message.ack()

    def requeue(self) -> None:
        self.is_requeued = True
        self.acknowledge()

    def is_unwanted(self) -> bool:
        return False

    def announce_stored_end(self, meta: dict[str, Any]) -> None:
        """Send no event: nobody listens."""


class _Job(DeviceJob):
    """The package's job, without a device loop; its pauses are in virtual time."""

    def __init__(self, process: WorkerProcess, request: Any) -> None:
        loop: Any = SimpleNamespace()
        super().__init__(
            request, loop, deliveries=process.deliveries, max_deliveries=MAX_DELIVERIES,
            is_stopping=lambda: process.is_stopping,
        )  # fmt: skip
        self._process = process

    def _pause(self) -> None:
        self._process.sleep(1.0)
