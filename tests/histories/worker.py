"""A worker process as far as delivery goes: the package's own transport, deliveries, lease and jobs, in virtual time.

Its threads are actors: `main` connects, claims and hands messages out, `lease` pulses, and each job has one of its own.
What is not the package's stands in for Celery: the loop that reconnects and the result backend. Connections, the choice
of the server and the event loop are kombu's own.
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
from redis.exceptions import ConnectionError as RedisConnectionError

from sdtpu_worker.config import read_config
from sdtpu_worker.delivery import transport
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.worker.broker_clients import first_client
from sdtpu_worker.worker.services import DeviceServices
from tests.histories.actors import Actor, ActorLock
from tests.histories.event_loop import VirtualHub
from tests.histories.jobs import APP, MAX_DELIVERIES, receive
from tests.histories.messages import QUEUE, REPLIES, TASK
from tests.histories.servers import VirtualConnection, connection_options, make_pool

if TYPE_CHECKING:
    from tests.histories.servers import Server
    from tests.histories.world import World

LEASE_S = 6.0  # a pulse each second is then the slowest that a lease allows
BRIEF_S = LEASE_S / 3
"""A pause, or a step of Redis' clock, of fewer seconds is none: leases are renewed that often."""
PREFETCH = 3
CONFIG = read_config(APP.conf)


class _Stopping(Exception):
    """The worker got a SIGTERM while it connected."""


class VirtualChannel(transport.Channel):
    """The package's channel, on the connections of its process."""

    process: WorkerProcess
    connection_class = VirtualConnection

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params = super()._connparams(asynchronous)
        server = self.process.world.server_of(params["host"])
        return {**connection_options(self.process, server), "connection_class": params["connection_class"]}


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
        on_devices: the tags of those whose jobs have a slot.
        revoked: the tasks that Celery takes for revoked here.
        is_cut_off: none of its commands reaches Redis.
        consumer: the channel on which it consumes; None while it has none.
        followed: the server of that channel, or of the one before.
        must_reconnect: that channel's connection was lost by more than its idleness.
        paused_at: when, in true time, it was paused.
        suspended_s: how long its monotonic clock stood still.
        wall_ahead_s: how far its wall clock is ahead of true time.
        started_at: in true time.
        away, hung: when, in true time, it was paused or cut off, and its devices made no progress: from, until.
    """

    def __init__(self, world: World, host: str) -> None:
        self.world, self.host = world, host
        self.is_dead = self.is_paused = self.is_suspended = self.is_cut_off = False
        self.is_hung = self.is_stopping = self.has_left = self.must_reconnect = False
        self.tasks: dict[str, str] = {}
        self.on_devices: set[str] = set()
        self.revoked: set[str] = set()
        self.consumer: Any = None
        self.followed: Server | None = None
        self.suspended_s = self.wall_ahead_s = 0.0
        self.paused_at = 0.0
        self.started_at = world.now
        self.away: list[tuple[float, float]] = []
        self.hung: list[tuple[float, float]] = []
        self.actors: dict[str, Actor] = {}
        self.wake_at: dict[str, float] = {}  # by actor, on the monotonic clock
        self._wakes: dict[str, Callable[[], Any]] = {}  # by actor: says whether it wakes before that
        app: Any = SimpleNamespace(connection_for_read=world.connection, conf=APP.conf)
        self.services = DeviceServices(app, host, CONFIG)
        self.deliveries = self.services.deliveries = Deliveries(partial(first_client, app), Keys(), LEASE_S, host)
        self.deliveries.connection._connecting = ActorLock()  # type: ignore[assignment]  # stands for threading.Lock
        self._results = redis.Redis(connection_pool=make_pool(self, world.results))
        intake = Intake(
            deliveries=self.deliveries,
            is_task_queue=lambda queue: queue == QUEUE,
            known_tasks={TASK},
            max_message_bytes=10_000,
            max_holders=10 * MAX_DELIVERIES,
            on_bad=world.facts.on_bad,
            devices_make_progress=lambda: not self.is_hung,
            on_reply=lambda error: None,
        )
        channel = type("Channel", (VirtualChannel,), {"process": self})
        self.transport = type("Transport", (transport.Transport,), {"intake": intake, "Channel": channel})
        self.spawn("main", self._consume)

    @property
    def wake_up(self) -> Any:
        """The connection on which it is told of new messages; None while it has none."""
        return None if self.consumer is None else self.consumer._wake_up._connection

    def monotonic(self) -> float:
        """Return its monotonic clock, in seconds."""
        return self.world.now - self.suspended_s

    def wall(self) -> float:
        """Return its wall clock, in seconds since 1970."""
        return self.world.now + self.wall_ahead_s

    def kill(self) -> None:
        """End it: SIGKILL."""
        self.is_dead, self.consumer = True, None
        for actor in list(self.actors.values()):
            actor.kill()
        for server in self.world.everything:
            for connection in [each for each in server.connections if each.process is self]:
                VirtualConnection.disconnect(connection)  # not as kombu does it: nobody is there to know

    def stop(self) -> None:
        """Have it stop: SIGTERM."""
        if not self.is_stopping:
            self.is_stopping = True
            self.spawn("stop", self._leave)

    def ask(self) -> None:
        """Have it ask another worker, as Celery's mingle and inspect do."""
        self.spawn(f"ask-{len(self.actors)}", self._ask)

    def pause(self, is_suspended: bool) -> None:
        """Stop it where it stands.

        Args:
            is_suspended: its monotonic clock stands still too.
        """
        self.is_paused, self.is_suspended, self.paused_at = True, is_suspended, self.world.now
        self.must_reconnect |= not self.actors["main"].is_idle  # it may next write to what Redis has closed
        self.go_away(self.away)

    def resume(self) -> None:
        """Let it go on."""
        self.is_paused = False
        if self.is_suspended:
            self.suspended_s += self.world.now - self.paused_at
        self.come_back()

    def is_away(self) -> bool:
        """Return whether it is not to take messages now."""
        return self.is_dead or self.is_paused or self.is_cut_off or self.is_stopping or self.followed.is_down

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
        if not self.actors[name].is_idle or self._wakes[name]():
            return self.world.now
        return self.world.now + max(0.0, self.wake_at[name] - self.monotonic())

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        """Start a thread."""
        self.wake_at[name], self._wakes[name] = 0.0, lambda: False
        self.actors[name] = Actor(name, body, self)

    def sleep(self, seconds: float, wakes: Callable[[], Any] = lambda: False) -> None:
        """Wait on the monotonic clock, or until something wakes the actor. An actor's thread."""
        actor = Actor.current
        assert actor is not None
        until = self.wake_at[actor.name] = self.monotonic() + seconds
        self._wakes[actor.name] = wakes
        actor.idle()
        while self.monotonic() < until - 1e-6 and not wakes():
            actor.idle()
        self._wakes[actor.name] = lambda: False

    def _pulse(self, lease: Lease) -> None:
        while "stop" not in self.actors or not self.actors["stop"].is_done:
            lease.pulse()
            self.sleep(lease._pulse_s())

    def _consume(self) -> None:
        """Connect, and claim until the connection breaks, as Celery's consumer does, until the worker stops."""
        with contextlib.suppress(_Stopping):
            while not self.is_stopping:
                connection, hub = self.world.connection(), VirtualHub(self)
                try:
                    connection.ensure_connection(callback=self._look_whether_to_stop)
                    self.must_reconnect = False
                    connection.transport.register_with_event_loop(connection.connection, hub)
                    self._consume_on(connection, hub)
                except connection.connection_errors as exc:
                    self.world.facts.on_consumer_lost(self, exc)
                finally:
                    self.consumer = None
                    if not self.is_dead:
                        with contextlib.suppress(Exception):  # as Celery does
                            connection.collect(socket_timeout=1.0)
                    hub.close()

    def _look_whether_to_stop(self) -> None:
        if self.is_stopping:
            raise _Stopping

    def _consume_on(self, connection: Any, hub: VirtualHub) -> None:
        """Claim from a new connection until it breaks."""
        channel = connection.default_channel
        channel.basic_qos(0, PREFETCH, False)
        channel.basic_consume(QUEUE, False, lambda message: receive(self, message), "tag")
        self.deliveries.on_free = lambda: hub.call_soon(lambda: None)
        self.services._follow(connection)
        self.world.facts.on_follow(self, self.world.server_of(connection.hostname))
        if self.services._lease is None:  # as in `DeviceServices.on_consume`
            lease = self.services._lease = Lease(self.deliveries, lambda: not self.is_hung, clock=self.monotonic)
            self.spawn("lease", partial(self._pulse, lease))
        self.consumer = channel
        while not self.is_stopping:
            hub.run_once()

    def _ask(self) -> None:
        """Ask another worker, and read its reply from a queue that is no task queue."""
        got: list[Any] = []
        try:
            connection = self.world.connection()
            connection.connect()
            channel = connection.default_channel
            self.world.reply(self.world.server_of(connection.hostname))
            channel.brpop_timeout = 0.01  # of true time
            channel.client.connection = channel.client.connection_pool.get_connection()  # as kombu's poller does
            channel.basic_consume(REPLIES, True, got.append, "tag")
            channel._brpop_start()
            channel._brpop_read()
        except (RedisConnectionError, OSError, Empty):  # a reply may be lost with its connection
            return
        self.world.facts.on_reply(self, [message.payload for message in got])
        with contextlib.suppress(Exception):
            connection.collect()

    def _leave(self) -> None:
        """Do what a worker does at its end: wait for its jobs, then requeue what it still holds."""
        while self.runnable() != ["stop"] and any(name.startswith(("job", "main")) for name in self.runnable()):
            self.sleep(0.5)
        self.deliveries.requeue_all()
        with contextlib.suppress(Exception):  # as `DeviceServices` does
            self.deliveries.flush()
        self.has_left = True

    # What Celery knows as the result backend

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        """Return what is stored of a task."""
        raw = self._patiently(lambda: self._results.get(f"celery-task-meta-{task_id}"))
        return json.loads(raw) if raw else {"status": "PENDING", "result": None}

    def mark_as_revoked(self, task_id: str, reason: str = "", **_: Any) -> None:
        """Store that a task is revoked."""
        self.store(task_id, "REVOKED", reason)

    def store(self, task_id: str, status: str, reason: str = "") -> None:
        """Store a task's end: not over a success."""
        if self.get_task_meta(task_id)["status"] != "SUCCESS":
            text = json.dumps({"status": status, "result": None})
            self._patiently(lambda: self._results.set(f"celery-task-meta-{task_id}", text))
            self.world.facts.on_stored(task_id, status, reason)

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """Ask until Redis answers, as a thread that runs jobs does."""
        while True:
            try:
                return ask()
            except RedisConnectionError:
                self.sleep(1.0)
