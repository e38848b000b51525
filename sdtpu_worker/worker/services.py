"""The composition root of a device worker: one object that holds everything its process has beside Celery's parts.

`DeviceWorkerStep` makes it, starts it and stops it; the pool and the boot steps of the consumer get it handed. What
has to be changed in kombu, in Celery's app or in the Python process is changed in `start` and undone in `stop`.

    config ─┬─ health ◀───────────── event loop, leases, device loop, pool
            ├─ health server ──────▶ health
            ├─ deliveries ◀──┬────── transport (claims), jobs (acknowledge, requeue, snapshots)
            │                ├────── lease (renew, sweep, load reports)
            │                └────── start recorder ◀── device loop
            └─ serving: engine, device loop, image store, reuse
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from celery.utils.functional import noop
from kombu.transport.redis import Transport as RedisTransport
from redis.exceptions import RedisError

from sdtpu_worker.config import Config
from sdtpu_worker.contract.load_report import publish_load, withdraw_load
from sdtpu_worker.delivery import transport
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.envelope import BadEnvelope
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.images.open_pictures import PictureOpener
from sdtpu_worker.images.store import further_stores
from sdtpu_worker.operations.connections import connections_warning
from sdtpu_worker.operations.health import WorkerHealth, process_age_s
from sdtpu_worker.operations.health_http import HealthServer
from sdtpu_worker.operations.redis_checks import redis_warnings
from sdtpu_worker.worker.broker_clients import CONSUMER_OPTIONS, client_maker, first_client
from sdtpu_worker.worker.observation import Observation
from sdtpu_worker.worker.process_changes import (
    change_app,
    freeze_start_up,
    share_result_backend,
    watch_failures_outside_tasks,
)
from sdtpu_worker.worker.process_ends import end_process, leave_soon
from sdtpu_worker.worker.refused_job import end_refused_job
from sdtpu_worker.worker.result_patience import wait_for_results
from sdtpu_worker.worker.reuse import refuse_reuse, reusing
from sdtpu_worker.worker.serving import Hooks, Serving
from sdtpu_worker.worker.slot_view import SlotReporter, report_slots
from sdtpu_worker.worker.start_recorder import StartRecorder

logger = logging.getLogger(__name__)

_HOLDERS_PER_DELIVERY = 10
"""How many more times than on the devices a message may be in the hands of workers that die: it is seldom why."""
_REPORT_EVERY_S = 5.0


class PartMakers(Protocol):
    """Makes the parts that differ between device workers; `DevicePool` does, and its subclasses differ in them."""

    @property
    def make_engine(self) -> Callable[[Config, Callable[[str], None]], Any]:
        """Make a warm engine on this host's devices; the second argument is told what it is at: `compiling`."""

    @property
    def make_store(self) -> Callable[[Any, str], Any]:
        """Make the image store for an app and the setting `sdtpu_image_store`."""

    @property
    def make_policy(self) -> Callable[[Any, Config], Any]:
        """Make the policy for an engine."""


class DeviceServices:
    """What the process of one device worker has. Made, started and stopped in the worker's main thread.

    Args:
        app: the Celery app.
        hostname: the worker's name.
        config: the settings.

    Attributes:
        health: what `/livez` and `/readyz` say.
        observation: what `/metrics` and traces show.
        deliveries: the messages that this worker holds; None when the broker is not Redis, whose own guarantees hold
            then.
        serving: the engine with its device loop and image store; None before `start`.
        stopping: set when nothing waits for results and images any more; their jobs are requeued.
    """

    def __init__(self, app: Any, hostname: str, config: Config) -> None:
        self.config = config
        self.health = WorkerHealth(config.lease_s, config.stall_s, process_s=process_age_s())
        self.observation = Observation(self.health, config.log_prompts)
        self.deliveries: Deliveries | None = None
        self.serving: Serving | None = None
        self.stopping = threading.Event()
        self._app, self._hostname = app, hostname
        self._consumer: Any = None
        self._lease: Lease | None = None
        self._slot_reporter: SlotReporter | None = None
        self._server: str | None = None  # the URL of the Redis that the consumer is connected to
        self._has_looked_at_redis = False
        self._load_report_at = 0.0
        self._undo = ExitStack()

    def start(self, pool: PartMakers) -> None:
        """Make everything ready for the first message. When that fails, what was started is stopped again.

        Args:
            pool: makes the engine, the image store and the policy.

        Raises:
            ConfigurationError: a device, a checkpoint, a size, an address or a store that is configured is not there.
        """
        started = time.monotonic()
        with ExitStack() as undo:
            if self.config.health_address is not None:  # first, so that probes are answered while programs compile
                pages = self.observation.pages()
                server = HealthServer(self.config.health_address, self.health.live, self.health.ready, pages)
                undo.callback(server.close)
            undo.enter_context(watch_failures_outside_tasks())
            undo.enter_context(share_result_backend(self._app))
            self.health.enter("looking at the broker")
            self._connect_to_broker(undo)
            self.health.enter("looking at the image store")
            store = pool.make_store(self._app, self.config.image_store)
            engine = pool.make_engine(self.config, self.health.enter)
            undo.callback(engine.close)
            policy = pool.make_policy(engine, self.config)
            on_tick = self.observation.watch_ticks(engine)
            hooks = Hooks(end_process, self._make_start_recorder(undo), on_tick, self.stopping.is_set)
            opener = PictureOpener([store, *further_stores(self._app)], hooks.give_up)
            count = partial(self.observation.figures.count, "sdtpu_reuse_total")
            reuse = undo.enter_context(
                reusing(self._app, self.config, engine, store, self.deliveries, count, self.devices_make_progress)
            )
            self.serving = serving = Serving(
                engine, store, policy, self.config, hooks, opener, self.observation.tracing, reuse
            )
            undo.callback(serving.close)
            self.observation.watch_serving(serving)
            if self._has_looked_at_redis:
                self._warn_of_connections()
            loop = serving.loop
            self.health.watch_device(lambda: loop.alive, lambda: loop.stalled_s, lambda: loop.stats.lost_devices)
            undo.enter_context(freeze_start_up())
            self.health.enter("ready to consume, connecting to the broker")
            self._undo = undo.pop_all()
        logger.info("ready: %s, after %.1f s", serving.describe(), time.monotonic() - started)

    def stop(self, is_stuck: bool) -> None:
        """Requeue what is still held, end the threads and undo what `start` changed. Again is harmless.

        Args:
            is_stuck: some threads of jobs do not end (a driver waits for a lost network): the process leaves without
                them, a few seconds later.
        """
        self.stopping.set()
        self._undo.close()
        if is_stuck:
            leave_soon()

    def on_consume(self, consumer: Any) -> None:
        """Take note of a new connection, before the first message is taken from it."""
        if not self.health.started:
            self.health.on_consume()
            logger.info("taking jobs; started in %s", self.health.start_text())
        self.health.on_consume()
        if self.deliveries is None:
            return
        self._consumer, hub = consumer, consumer.hub
        self.observation.follow(consumer, self.deliveries.keys.prefix)
        self.deliveries.on_free = lambda: hub.call_soon(noop)
        self._follow(consumer.connection)
        if not self._has_looked_at_redis:
            self._warn_of_redis()
            self._warn_of_connections()
        if self._lease is None:
            self._lease = Lease(self.deliveries, self.devices_make_progress, self._on_contact)
            self._lease.start()
            self.observation.watch_deliveries(self.deliveries, self._lease)
            assert self.serving is not None
            self._slot_reporter = report_slots(self.serving.slots, self.deliveries, self.config.queue, self._hostname)

    def _follow(self, connection: Any) -> None:
        """Lease and acknowledge on the server from which the consumer takes messages: kombu may have failed over."""
        assert self.deliveries is not None
        server = connection.as_uri(include_password=True)
        if server == self._server:
            return
        if self._server is not None:
            logger.warning("jobs now come from %s; those that came from another server are finished, and redelivered"
                           " there unless it has become a copy of this one", connection.as_uri())  # fmt: skip
            self._has_looked_at_redis = False
        self._server = server
        self.deliveries.connection.follow(client_maker(connection))
        if self._lease is not None:
            self._lease.lose_contact()

    def devices_make_progress(self) -> bool:
        """Return whether no tick is later than `sdtpu_stall_s`; True while there are no devices yet. Any thread."""
        if self.serving is None:
            return True
        loop = self.serving.loop
        return loop.alive and loop.stalled_s <= self.config.stall_s

    def wait_for_results(self) -> None:
        """Have the calling thread, which runs jobs, wait for a result backend that is away; see `result_patience`."""
        wait_for_results(self._app.backend, self.stopping.is_set)

    def to_json(self) -> dict[str, Any]:
        """Return the counters of deliveries, for `inspect stats`."""
        held = self.deliveries
        if held is None:
            return {}
        return {"held": len(held), "redelivered": held.redelivered, "dead_letters": held.dead_letters}

    def _connect_to_broker(self, undo: ExitStack) -> None:
        """Have kombu claim messages through our transport, if the broker is Redis."""
        app, config = self._app, self.config
        if not isinstance(app.connection_for_read().transport, RedisTransport):
            refuse_reuse(config)
            logger.warning(
                "the broker is not Redis: leases, hand-over, delivery limits and message checks are off; jobs of a"
                " worker that dies come back as its broker sees fit"
            )
            undo.enter_context(change_app(app, {}))
            return
        self.health.watch_redis()
        options = app.conf.broker_transport_options
        keys = Keys(options.get("global_keyprefix", ""))
        self.deliveries = deliveries = Deliveries(partial(first_client, app), keys, config.lease_s, self._hostname)
        self.observation.watch_dead_letters(deliveries)
        settings = {"broker_transport_options": {**CONSUMER_OPTIONS, **options}, "broker_channel_error_retry": True}
        undo.enter_context(change_app(app, settings, transport.EagerConnection))
        undo.enter_context(
            transport.installed(
                Intake(
                    deliveries=deliveries,
                    is_task_queue=lambda queue: queue in app.amqp.queues.consume_from,
                    known_tasks=app.tasks,
                    max_message_bytes=config.max_message_bytes,
                    max_holders=_HOLDERS_PER_DELIVERY * config.max_deliveries,
                    on_bad=self._end_refused_job,
                    devices_make_progress=self.devices_make_progress,
                    on_reply=self.health.on_claim,
                )
            )
        )
        undo.callback(self._leave_redis)
        try:
            self._warn_of_redis()
        except ConfigurationError:
            raise
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.warning("Redis cannot be reached yet, and is looked at again when it can: %s", exc)

    def _make_start_recorder(self, undo: ExitStack) -> Any:
        """Return what the device loop tells of the jobs that start."""
        if self.deliveries is None:
            return lambda task_ids, alone: None
        recorder = StartRecorder(self.deliveries)
        undo.callback(recorder.close)
        return recorder.record

    def _leave_redis(self) -> None:
        """Requeue every message, withdraw the load report, close the connections."""
        assert self.deliveries is not None
        if self._lease is not None:
            self._lease.stop()
        if self._slot_reporter is not None:
            self._slot_reporter.stop()
        self.deliveries.requeue_all()
        try:
            self.deliveries.flush()
            prefix = self.deliveries.keys.prefix
            withdraw_load(self.deliveries.client, self.config.queue, self._hostname, prefix)
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.warning("Redis could not be told that this worker stops; its leases expire instead: %s", exc)
        self.deliveries.connection.close()

    def _end_refused_job(self, bad: BadEnvelope) -> None:
        """End the job of a message that cannot be run."""
        end_refused_job(bad, self._app, self._consumer and self._consumer.event_dispatcher)

    def _warn_of_redis(self) -> None:
        """Log what this Redis may do to jobs.

        Raises:
            ConfigurationError: no job can run with this Redis.
        """
        assert self.deliveries is not None
        client, prefix = self.deliveries.client, self.deliveries.keys.prefix
        for text in redis_warnings(client, images_in_redis=self.config.image_store.startswith("redis"), prefix=prefix):
            logger.warning("%s", text)
        self._has_looked_at_redis = True

    def _warn_of_connections(self) -> None:
        """Log that this Redis may grant too few connections for all jobs that this worker may hold.

        Raises:
            ConfigurationError: it can never grant them.
        """
        assert self.deliveries is not None
        assert self.serving is not None
        slots, more = self.serving.engine.info.num_slots, self.serving.most_followers
        warning = connections_warning(self.deliveries.client, slots, more)
        if warning:
            logger.warning("%s", warning)

    def _on_contact(self) -> None:
        """Take note that Redis answered, and publish the load report when it is time. The lease's thread."""
        self.health.contact()
        if self.deliveries is None or self.serving is None or time.monotonic() < self._load_report_at:
            return
        self._load_report_at = time.monotonic() + _REPORT_EVERY_S
        load = self.serving.load(self._hostname)
        try:
            publish_load(self.deliveries.client, self.config.queue, load, self.deliveries.keys.prefix)
        except RedisError as exc:  # no memory, no permission; clients then estimate without this worker
            logger.warning("the load report of this worker could not be published: %s", exc)
        if self.config.health_address is not None:
            self.observation.queues.look(self.deliveries.client)
