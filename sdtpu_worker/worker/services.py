"""What a device worker's process has besides Celery's parts and the engine: deliveries, lease, health, its load report.

Made when the worker is configured, started when it first consumes, stopped last. Owned by the worker's main thread;
what others may call says so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from celery.backends.redis import RedisBackend
from celery.states import FAILURE
from celery.utils.functional import noop
from kombu.transport.redis import Transport as RedisTransport
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError

from sdtpu_worker.config import Config
from sdtpu_worker.contract.load_report import publish_load, withdraw_load
from sdtpu_worker.delivery import transport
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.envelope import BadEnvelope
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.operations.health import WorkerHealth
from sdtpu_worker.operations.health_http import HealthServer
from sdtpu_worker.operations.redis_checks import redis_warnings
from sdtpu_worker.worker import serving

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

EX_ENGINE_LOST = 75
"""Exit code of a worker whose engine cannot go on: its supervisor should start it anew (EX_TEMPFAIL)."""
_BROKER_TIMEOUT_S = 5.0
_HOLDERS_PER_DELIVERY = 10
"""How much more often than on the devices a message may be in the hands of workers that die: most are not its fault."""
_RECORD_TIMEOUT_S, _SUSPECT_TIMEOUT_S = 0.05, 0.25
_REPORT_EVERY_S = 5.0
_LEAVE_AFTER_S = 5.0


class DeviceWorker:
    """One worker process; `current()` finds it.

    Args:
        app: the Celery app.
        hostname: the worker's name.
        config: the settings.

    Attributes:
        deliveries: what it holds; None when the broker is not Redis, whose own guarantees hold then.
        stopping: results and images are not waited for any more; the jobs go back to their queues.
    """

    def __init__(self, app: Any, hostname: str, config: Config) -> None:
        self._app, self._hostname, self._config = app, hostname, config
        self.health = WorkerHealth(config.lease_s, config.stall_s)
        self.deliveries: Deliveries | None = None
        self.stopping = threading.Event()
        self._lease: Lease | None = None
        self._server: HealthServer | None = None
        self._report_at = 0.0
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="sdtpu-starts")
        self._recording: Future[None] | None = None
        if not isinstance(app.connection_for_read().transport, RedisTransport):
            logger.warning(
                "the broker is not Redis: leases, hand-over, delivery limits and message checks are off; jobs of a"
                " worker that dies come back as its broker sees fit"
            )
            return
        options = app.conf.broker_transport_options
        keys = Keys(options.get("global_keyprefix", ""))
        self.deliveries = Deliveries(self._connect, keys, config.lease_s, hostname)
        self._warned_of = options.get("visibility_timeout")
        app.conf.broker_transport_options = {
            "socket_keepalive": True,
            "socket_timeout": 2 * _BROKER_TIMEOUT_S,
            "socket_connect_timeout": _BROKER_TIMEOUT_S,
            **options,
            "unacked_key": "sdtpu:unacked",
            "unacked_index_key": "sdtpu:unacked_index",
            "unacked_mutex_key": "sdtpu:unacked_mutex",
            "visibility_timeout": config.lease_s,
            "unacked_restore_interval": config.lease_s / 3,
        }
        app.amqp.Connection = transport.EagerConnection
        transport.use_in_this_process(
            transport.Intake(
                deliveries=self.deliveries,
                known_tasks=app.tasks,
                max_message_bytes=config.max_message_bytes,
                max_holders=_HOLDERS_PER_DELIVERY * config.max_deliveries,
                on_bad=self._store_error,
                is_well=self.is_well,
                on_contact=self.health.contact,
            )
        )

    def is_well(self) -> bool:
        """Whether the devices make progress. Any thread."""
        return serving.is_well(self._config.stall_s)

    def start(self) -> None:
        """Answer on the health address.

        Raises:
            ConfigurationError: the address is in use.
        """
        if self._config.health_address is not None:
            self._server = HealthServer(self._config.health_address, self.health.live, self.health.ready)

    def wait_for_results(self) -> None:
        """Have the calling thread, which runs jobs, wait for the result backend as long as Redis is away or full.

        Celery has a backend in every thread; it would give up after 20 s, read without a second try, and fail the job
        of whose start a full Redis, or a master that has just become a replica, takes no note.
        """
        backend = self._app.backend
        if isinstance(backend, RedisBackend):
            policy = {**backend.retry_policy, "max_retries": None, "callback": self._check_patience}
            read = backend.get
            backend.retry_policy, backend.get = policy, lambda key: backend.ensure(read, (key,))
            backend.connection_errors = (*backend.connection_errors, OutOfMemoryError, ReadOnlyError)

    def on_consume(self, consumer: Any) -> None:
        """Runs at every connection, before the first message is taken from it."""
        self.health.on_consume()
        if self.deliveries is None:
            return
        hub = consumer.hub
        self.deliveries.on_free = lambda: hub.call_soon(noop)
        if self._lease is None:
            self._warn()
            self._lease = Lease(self.deliveries, self.is_well, self._on_contact)
            self._lease.start()

    def stop(self, is_stuck: bool) -> None:
        """Give everything back and end the threads.

        Args:
            is_stuck: some threads do not end (a driver that waits for a lost network): leave without them.
        """
        self.stopping.set()
        self._recorder.shutdown(wait=False, cancel_futures=True)
        if self._lease is not None:
            self._lease.stop()
        if self.deliveries is not None:
            self.deliveries.requeue_all()
            try:
                self.deliveries.flush()
                prefix = self.deliveries.keys.prefix
                withdraw_load(self.deliveries.client, self._config.queue, self._hostname, prefix)
            except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
                logger.warning("Redis could not be told that this worker stops; the leases end by themselves: %s", exc)
            self.deliveries.close()
        if self._server is not None:
            self._server.close()
        if is_stuck:
            logger.critical("some threads do not end; leaving without them in %.0f s", _LEAVE_AFTER_S)
            threading.Thread(target=_leave, name="sdtpu-leave", daemon=True).start()

    def record_starts(self, task_ids: Sequence[str], alone: bool) -> None:
        """Write down who gets a slot, before it does; a Redis that does not answer soon is not waited for.

        The device loop's thread. While an earlier answer is due, only a job that starts alone, a suspect, is waited
        for; the others are written down when Redis gets to it.

        Args:
            task_ids: who gets one.
            alone: nobody else has one.
        """
        if self.deliveries is None:
            return
        is_slow = self._recording is not None and not self._recording.done()
        self._recording = self._recorder.submit(self.deliveries.record_starts, list(task_ids), alone)
        try:
            if alone or not is_slow:
                self._recording.result(_SUSPECT_TIMEOUT_S if alone else _RECORD_TIMEOUT_S)
        except Exception as exc:  # a time-out, the driver's own errors
            logger.debug("the starts of %d jobs were not recorded in time: %r", len(task_ids), exc)

    def to_json(self) -> dict[str, Any]:
        """Return counters for `inspect stats`."""
        held = self.deliveries
        if held is None:
            return {}
        return {"held": len(held), "redelivered": held.redelivered, "dead_letters": held.dead_letters}

    def _connect(self) -> Redis:
        """Make a client of the broker, whatever it takes to reach it: TLS, a password, Sentinels."""
        from redis import Redis

        connection = self._app.connection_for_read(
            transport_options={
                "socket_timeout": _BROKER_TIMEOUT_S,
                "socket_connect_timeout": _BROKER_TIMEOUT_S,
                "max_connections": 1000,
            }
        )
        connection.connect()
        return Redis(connection_pool=connection.channel().pool)

    def _check_patience(self) -> None:
        if self.stopping.is_set():
            raise EngineUnavailable("the worker stopped before the result could be stored; the job goes back")

    def _store_error(self, bad: BadEnvelope) -> None:
        """Give a message that cannot be run its result."""
        if bad.ignore_result:
            return
        try:
            self._app.backend.store_result(bad.task_id, bad.error, FAILURE)
        except Exception as exc:  # each result backend has errors of its own
            logger.warning("the error of task %s could not be stored: %s", bad.task_id, exc)

    def _warn(self) -> None:
        """Say what this Redis may do to jobs."""
        assert self.deliveries is not None
        in_redis = self._config.image_store.startswith("redis")
        for text in redis_warnings(
            self.deliveries.client,
            lease_s=self._config.lease_s,
            visibility_timeout=self._warned_of,
            images_in_redis=in_redis,
        ):
            logger.warning("%s", text)

    def _on_contact(self) -> None:
        """Redis answered: the lease's thread."""
        self.health.contact()
        if time.monotonic() < self._report_at:
            return
        load = serving.load(self._hostname)
        if self.deliveries is not None and load is not None:
            self._report_at = time.monotonic() + _REPORT_EVERY_S
            try:
                publish_load(self.deliveries.client, self._config.queue, load, self.deliveries.keys.prefix)
            except RedisError as exc:  # no memory, no permission; clients then estimate without this worker
                logger.warning("the load of this worker could not be reported: %s", exc)


_current: DeviceWorker | None = None


def set_current(worker: DeviceWorker | None) -> None:
    """Make this the process's worker."""
    global _current
    _current = worker


def current() -> DeviceWorker | None:
    """Return this process's worker, if it is a device worker."""
    return _current


def _leave() -> None:
    time.sleep(_LEAVE_AFTER_S)
    os._exit(1)
