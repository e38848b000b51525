"""The boot steps that `install` gives to Celery. They check and wire; what they start and stop is in `services.py`.

Every worker of the app has them, also one that holds no devices; so what only a device worker needs is imported where
it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals
from celery.platforms import EX_FAILURE

from sdtpu_worker.client.routing import device_queues
from sdtpu_worker.config import Config, read_config, read_setting
from sdtpu_worker.contract.queues import shard_queues
from sdtpu_worker.errors import ConfigurationError, SdtpuError
from sdtpu_worker.operations.log_format import install_log_format, release_warnings, writes_json
from sdtpu_worker.operations.result_checks import check_results, make_result_backend
from sdtpu_worker.plugin import POOL, given_options, is_device_pool

if TYPE_CHECKING:
    from sdtpu_worker.worker.services import DeviceServices

logger = logging.getLogger(__name__)

_LOOK_FOR_URGENT_JOBS_EVERY_S = 0.1
_POOL_OF_THREADS = "its pool runs its jobs in threads of one process"
_IGNORED = {
    "pool": "its pool is DevicePool; a worker with -P prefork consumes other queues",
    "concurrency": "it holds as many jobs as its devices have slots, twice (sdtpu_slots_per_device)",
    "prefetch_multiplier": "it holds as many jobs as its devices have slots, twice (sdtpu_slots_per_device)",
    "disable_prefetch": "it holds as many jobs as its devices have slots, twice (sdtpu_slots_per_device)",
    "max_tasks_per_child": _POOL_OF_THREADS,
    "max_memory_per_child": _POOL_OF_THREADS,
    "pool_start_method": _POOL_OF_THREADS,
}
"""Options of `celery worker` that change nothing in a device worker, and why."""


class DeviceWorkerStep(bootsteps.StartStopStep):
    """Checks every worker of the app; makes, starts and stops the services of one that holds devices.

    It starts after the pool object exists and before the first message is taken. Celery stops its steps in the
    opposite order, so this step has the pool finish its jobs before it stops what they need.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._services: DeviceServices | None = None
        try:
            if has_devices := is_device_pool(worker.pool_cls):
                _set_up_log(worker)
            release_warnings()
            config = read_config(worker.app.conf) if has_devices else None
            ours = device_queues(worker.app)
        except ConfigurationError as exc:
            raise _refusal(str(exc)) from exc
        if config is None:
            _stay_ordinary(worker, ours)
            return
        _refuse_what_cannot_work(worker, config.queue)
        _say_what_is_ignored()
        _consume_device_queues(worker.app, ours, config)
        from sdtpu_worker.worker.services import DeviceServices

        self._services = DeviceServices(worker.app, worker.hostname, config)

    def start(self, worker: Any) -> None:
        """Start the services, hand them to the pool, and give the consumer the pool's capacity.

        Raises:
            SystemExit: something that is configured is not there; the reason is logged as one line.
        """
        if self._services is None:
            return
        signals.worker_process_init.send(sender=worker.hostname)  # as Celery's other pools do: set-up hangs on it
        try:
            check_results(worker.app)
            self._services.start(worker.pool)
        except SdtpuError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc
        except ImportError as exc:
            logger.critical(
                "a device worker needs what is not installed (%s): pip install 'sdtpu_worker[worker]', on a TPU host"
                " 'sdtpu_worker[tpu]'; an ordinary worker of this app consumes other queues, with -Q", exc,
            )  # fmt: skip
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
        try:
            consumer.pool.services.on_consume(consumer)
        except ConfigurationError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc

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


def _set_up_log(worker: Any) -> None:
    """Give the log of a device worker its format, before anything else is looked at.

    Raises:
        ConfigurationError: there is no such format.
    """
    log_format = read_setting("sdtpu_log_format", worker.app.conf)
    install_log_format(log_format)
    if log_format == "json":
        worker.quiet = True  # Celery prints its banner past the log


def _stay_ordinary(worker: Any, ours: Sequence[str]) -> None:
    """Leave the task's queues to the device workers, and say so.

    Raises:
        SystemExit: the worker was told to consume one of them, and to do so with another pool.
    """
    queues, pool = worker.app.amqp.queues, f"{worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}"
    is_chosen, taken = queues._consume_from is not None, [name for name in queues.consume_from if name in ours]
    if taken and (is_chosen or len(taken) == len(queues.consume_from)):
        raise _refusal(
            f"the queue {taken[0]!r} needs the pool {POOL}, but this worker was given {pool}; leave out -P, or consume"
            " other queues with -Q"
        )
    queues.deselect(taken)
    level = logging.INFO if is_chosen else logging.WARNING  # with -Q somebody has thought of it
    logger.log(
        level,
        "this is an ordinary worker, with the pool %s: it takes no jobs of sdtpu.generate. A device worker is started"
        " with -Q %s", pool, ours[0],
    )  # fmt: skip


def _consume_device_queues(app: Any, ours: Sequence[str], config: Config) -> None:
    """Have a device worker consume the tenants' queues beside its own; one that was told to serve a few serves those.

    Without -Q it serves all queues of the task, and those that the app's configuration names.
    """
    queues = app.amqp.queues
    if queues._consume_from is None:
        wanted: Sequence[str] = ours
    else:
        wanted = shard_queues(config.queue, config.tenant_shards) if config.queue in queues.consume_from else ()
    for name in wanted:
        if name not in queues.consume_from:
            queues.select_add(name)
    if app.conf.task_default_queue in ours:
        logger.warning(
            "task_default_queue is %r, a queue of device workers: what comes next in a chain or a chord, and has no"
            " route, comes here and fails unless this app has that task. Leave task_default_queue out",
            app.conf.task_default_queue,
        )


def _say_what_is_ignored() -> None:
    """Log one line for each option on the command line that a device worker has no use for."""
    for name in given_options(*_IGNORED):
        logger.warning("--%s is ignored by a device worker: %s", name.replace("_", "-"), _IGNORED[name])


def _refuse_what_cannot_work(worker: Any, queue: str) -> None:
    """Refuse a device worker that would fail its jobs, before anything is loaded.

    Raises:
        SystemExit: with the reason and the remedy.
    """
    accepted = set(worker.app.conf.accept_content)
    if worker.autoscale:
        raise _refusal("--autoscale cannot change how many jobs a device holds; leave it out")
    if not accepted <= {"json", "application/json"}:
        raise _refusal(f"accept_content must be ['json'] for a worker of the queue {queue!r}, got {sorted(accepted)}")
    try:
        make_result_backend(worker.app)  # before Celery's banner, which would end the worker with a traceback
    except ConfigurationError as exc:
        raise _refusal(str(exc)) from exc


def _refusal(reason: str) -> SystemExit:
    """Return what ends a worker that has not started: with a line on stderr, or in its log where that is JSON."""
    text = f"sdtpu_worker refuses to start (ConfigurationError): {reason}"
    if not writes_json():
        return SystemExit(text)
    logger.critical("%s", text)
    return SystemExit(EX_FAILURE)
