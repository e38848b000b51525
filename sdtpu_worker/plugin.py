"""`install(app)`: the one place that wires everything into a Celery app."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from celery import Celery, _state, bootsteps, signals
from celery.concurrency import get_implementation

from sdtpu_worker.config import read_config, read_setting
from sdtpu_worker.contract.queues import shard_queues
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.prompt_guard import install_prompt_guard
from sdtpu_worker.worker.remote_control import guard

logger = logging.getLogger(__name__)

POOL = "sdtpu_worker.pool:DevicePool"
_DEFAULTS = {
    "worker_pool": POOL,
    "worker_prefetch_multiplier": 1,
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
}


def install(app: Celery) -> Celery:
    """Turn a Celery app into one whose worker can serve: the task, the pool, the start-up checks.

    Safe to call in the module that web processes and ordinary workers share: it only sets defaults, which the app's
    own configuration overrides, and imports no JAX. A worker of the app that names other queues with `-Q` stays an
    ordinary one. Unless there is a default app already, this one becomes it, so that `generate.delay` finds it from
    every thread of a web server. Returns the app.
    """
    import sdtpu_worker.client.task  # noqa: F401  registers the shared task

    set_defaults(app, _DEFAULTS)
    app.steps["worker"].add(DeviceWorkerStep)
    app.steps["consumer"].add("sdtpu_worker.worker.urgent:UrgentPrefetchStep")
    app.steps["consumer"].add(DeliveryStep)
    signals.worker_init.connect(_leave_other_workers_alone, dispatch_uid="sdtpu_worker")
    if _state.default_app is None:
        app.set_default()
    return app


def set_defaults(app: Celery, values: Mapping[str, Any]) -> None:
    """Put values below the app's own configuration and above Celery's defaults, whenever that configuration loads.

    (Celery's `add_defaults` puts them above the configuration.)
    """

    def insert(source: Any, **_: Any) -> None:
        source.maps.insert(len(source.maps) - 1, dict(values))

    if app.configured:
        insert(app.conf)
    app.on_after_configure.connect(insert, weak=False)


def _leave_other_workers_alone(sender: Any, **_: Any) -> None:
    """Give a worker that was told to consume other queues only the pool that it would have had."""
    queues = sender.app.amqp.queues
    chosen = queues._consume_from  # None unless -Q chose
    ours = DeviceWorkerStep in sender.app.steps["worker"] and _is_device_pool(sender.pool_cls)
    if ours and chosen and read_setting("sdtpu_queue", sender.app.conf) not in chosen:
        sender.pool_cls = get_implementation("prefork")


class DeviceWorkerStep(bootsteps.StartStopStep):
    """Checks a worker before it starts and gives its consumer the pool's capacity."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.serves = _is_device_pool(worker.pool_cls)
        self._check(worker)
        if self.serves:
            self._configure(worker)

    def _check(self, worker: Any) -> None:
        """Refuse what cannot work, before anything is loaded."""
        queue, app = read_setting("sdtpu_queue", worker.app.conf), worker.app
        accepted = set(app.conf.accept_content)
        if not self.serves:
            if queue in app.amqp.queues.consume_from:
                _refuse(
                    f"the queue {queue!r} needs the pool {POOL}, but this worker has"
                    f" {worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}; set worker_pool = {POOL!r}"
                    " (sdtpu_worker.install(app) does, unless your configuration or -P says otherwise), or consume"
                    " other queues with -Q"
                )
        elif worker.autoscale:
            _refuse("--autoscale cannot change how many jobs a device holds; leave it out")
        elif not accepted <= {"json", "application/json"}:
            _refuse(f"accept_content must be ['json'] for a worker of the queue {queue!r}, got {sorted(accepted)}")

    def _configure(self, worker: Any) -> None:
        """Make an ordinary worker a device worker: its queues, its transport, what it logs."""
        from sdtpu_worker.delivery import transport
        from sdtpu_worker.worker.services import DeviceWorker, set_current

        app = worker.app
        try:
            config = read_config(app.conf)
        except ConfigurationError as exc:
            _refuse(str(exc))
        for name in shard_queues(config.queue, config.tenant_shards):
            if name not in app.amqp.queues.consume_from:
                app.amqp.queues.select_add(name)
        if app.conf.worker_cancel_long_running_tasks_on_connection_loss:
            logger.info("worker_cancel_long_running_tasks_on_connection_loss is ignored: jobs go on without Redis")
            app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
        warnings.filterwarnings("ignore", r"\s*In Celery 5\.1 we introduced", PendingDeprecationWarning)  # on the same
        app.conf.worker_enable_prefetch_count_reduction = False  # the transport counts what is held itself
        install_prompt_guard(app, transport.logger)
        set_current(DeviceWorker(app, worker.hostname, config))

    def start(self, worker: Any) -> None:
        """Runs after the pool is warm and before the first message is taken."""
        if self.serves:
            worker.concurrency = worker.consumer.initial_prefetch_count = worker.pool.limit
            worker.consumer.prefetch_multiplier = 1


class DeliveryStep(bootsteps.StartStopStep):
    """Tells a device worker when it consumes, and when its connection is gone."""

    requires = frozenset({"celery.worker.consumer.tasks:Tasks"})

    def include_if(self, consumer: Any) -> bool:
        """Whether this worker holds devices."""
        return _is_device_pool(type(consumer.pool))

    def start(self, consumer: Any) -> None:
        """Runs at every connection, before the first message is taken from it."""
        guard(consumer)
        _worker().on_consume(consumer)

    def stop(self, consumer: Any) -> None:
        """Runs at every loss of a connection, and when the worker stops."""
        _worker().health.on_disconnect()

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Say that the event loop turns."""
        hub.call_repeatedly(1.0, _worker().health.beat)


def _worker() -> Any:
    from sdtpu_worker.worker.services import current

    return current()


def _is_device_pool(pool: Any) -> bool:
    """Whether a pool, a class or its path, is `DevicePool` or made of it; does not import it to find out."""
    if isinstance(pool, str):
        return pool == POOL
    return getattr(pool, "holds_devices", False)


def _refuse(reason: str) -> None:
    raise SystemExit(f"sdtpu_worker refuses to start (ConfigurationError): {reason}")
