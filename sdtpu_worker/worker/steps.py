"""The boot steps that `install` gives to Celery. They check and wire; what they start and stop is in `services.py`.

Every worker of the app has them, also one that holds no devices; so what only a device worker needs is imported where
it is used.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.platforms import EX_FAILURE

from sdtpu_worker.config import read_config, read_setting
from sdtpu_worker.contract.queues import shard_queues
from sdtpu_worker.errors import ConfigurationError, SdtpuError
from sdtpu_worker.plugin import POOL, is_device_pool

if TYPE_CHECKING:
    from sdtpu_worker.worker.services import DeviceServices

logger = logging.getLogger(__name__)

_LOOK_FOR_URGENT_JOBS_EVERY_S = 0.1


class DeviceWorkerStep(bootsteps.StartStopStep):
    """Checks every worker of the app; makes, starts and stops the services of one that holds devices.

    It starts after the pool object exists and before the first message is taken. Celery stops its steps in the
    opposite order, so this step has the pool finish its jobs before it stops what they need.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        _refuse_what_cannot_work(worker)
        self._services: DeviceServices | None = None
        if not is_device_pool(worker.pool_cls):
            return
        try:
            config = read_config(worker.app.conf)
        except ConfigurationError as exc:
            raise _refusal(str(exc)) from exc
        queues = worker.app.amqp.queues
        for name in shard_queues(config.queue, config.tenant_shards):
            if name not in queues.consume_from:
                queues.select_add(name)
        from sdtpu_worker.worker.services import DeviceServices

        self._services = DeviceServices(worker.app, worker.hostname, config)

    def start(self, worker: Any) -> None:
        """Start the services, hand them to the pool, and give the consumer the pool's capacity.

        Raises:
            SystemExit: something that is configured is not there; the reason is logged as one line.
        """
        if self._services is None:
            return
        try:
            self._services.start(worker.pool)
        except SdtpuError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc
        worker.pool.serve(self._services)
        worker.concurrency = worker.consumer.initial_prefetch_count = worker.pool.limit
        worker.consumer.prefetch_multiplier = 1

    def stop(self, worker: Any) -> None:
        """Wait for the pool's jobs, then stop the services."""
        self._stop(worker.pool, worker.pool.stop)

    def terminate(self, worker: Any) -> None:
        """Hand every job over at once, then stop the services: a cold shutdown."""
        self._stop(worker.pool, worker.pool.terminate)

    def _stop(self, pool: Any, stop_pool: Any) -> None:
        if self._services is None:
            return
        try:
            stop_pool()
        finally:
            self._services.stop(is_stuck=pool.is_stuck)


class DeliveryStep(bootsteps.StartStopStep):
    """Tells the services when the worker consumes, when its connection is lost, and that its event loop turns."""

    requires = frozenset({"celery.worker.consumer.tasks:Tasks"})

    def include_if(self, consumer: Any) -> bool:
        """Return whether this worker holds devices."""
        return is_device_pool(consumer.pool)

    def start(self, consumer: Any) -> None:
        """Runs at every connection, before the first message is taken from it."""
        from sdtpu_worker.worker.remote_control import guard

        guard(consumer)
        consumer.pool.services.on_consume(consumer)

    def stop(self, consumer: Any) -> None:
        """Runs at every loss of a connection, and when the worker stops."""
        consumer.pool.services.health.on_disconnect()

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Have the event loop report once a second that it turns."""
        health = consumer.pool.services.health
        health.watch_event_loop()
        hub.call_repeatedly(1.0, health.beat)


class UrgentPrefetchStep(bootsteps.StartStopStep):
    """Has a device worker that consumes from Redis look for urgent jobs beyond its prefetch limit."""

    requires = frozenset({"celery.worker.consumer.tasks:Tasks"})

    def include_if(self, consumer: Any) -> bool:
        """Return whether this worker holds devices and lets jobs take each other's slots."""
        return is_device_pool(consumer.pool) and read_setting("sdtpu_preemption", consumer.app.conf)

    def start(self, consumer: Any) -> None:
        """Runs at every connection: what was lent on an earlier connection ended with it."""
        from sdtpu_worker.worker.urgent import UrgentPrefetch

        consumer.pool.urgent = UrgentPrefetch(consumer, consumer.pool)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Look now and then."""
        hub.call_repeatedly(_LOOK_FOR_URGENT_JOBS_EVERY_S, consumer.pool.urgent.look)


def _refuse_what_cannot_work(worker: Any) -> None:
    """Refuse a worker that would fail its jobs, before anything is loaded.

    Raises:
        SystemExit: with the reason and the remedy.
    """
    app, queue = worker.app, read_setting("sdtpu_queue", worker.app.conf)
    accepted = set(app.conf.accept_content)
    if not is_device_pool(worker.pool_cls):
        if queue in app.amqp.queues.consume_from:
            raise _refusal(
                f"the queue {queue!r} needs the pool {POOL}, but this worker has"
                f" {worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}; set worker_pool = {POOL!r}"
                " (sdtpu_worker.install(app) does, unless your configuration or -P says otherwise), or consume"
                " other queues with -Q"
            )
    elif worker.autoscale:
        raise _refusal("--autoscale cannot change how many jobs a device holds; leave it out")
    elif not accepted <= {"json", "application/json"}:
        raise _refusal(f"accept_content must be ['json'] for a worker of the queue {queue!r}, got {sorted(accepted)}")


def _refusal(reason: str) -> SystemExit:
    return SystemExit(f"sdtpu_worker refuses to start (ConfigurationError): {reason}")
