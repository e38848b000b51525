"""`install(app)`: turns a Celery app into one whose worker can serve. It wires; `worker/steps.py` does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery, _state, signals
from celery.concurrency import get_implementation

from sdtpu_worker.config import read_setting
from sdtpu_worker.operations.settings_guard import guard_settings

POOL = "sdtpu_worker.pool:DevicePool"
WORKER_STEPS = ("sdtpu_worker.worker.steps:DeviceWorkerStep",)
CONSUMER_STEPS = ("sdtpu_worker.worker.steps:DeliveryStep", "sdtpu_worker.worker.steps:UrgentPrefetchStep")
"""By name, so that a web process which installs the app imports nothing of the worker."""
_DEFAULTS = {
    "worker_pool": POOL,
    "worker_prefetch_multiplier": 1,
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
}


def install(app: Celery) -> Celery:
    """Turn a Celery app into one whose worker can serve: the task, the pool, the boot steps.

    Safe to call in the module that web processes and ordinary workers share: it only sets defaults, which the app's
    own configuration overrides, and imports no JAX. A worker of the app that names other queues with `-Q` stays an
    ordinary one. Unless there is a default app already, this app becomes the default, so that `generate.delay` finds
    it from every thread of a web server.

    Args:
        app: the app.

    Returns:
        The app.
    """
    import sdtpu_worker.client.task  # noqa: F401  registers the shared task

    set_defaults(app, _DEFAULTS)
    guard_settings(app)
    app.steps["worker"].update(WORKER_STEPS)
    app.steps["consumer"].update(CONSUMER_STEPS)
    signals.worker_init.connect(_leave_other_workers_alone, dispatch_uid="sdtpu_worker")
    if _state.default_app is None:
        app.set_default()
    return app


def set_defaults(app: Celery, values: Mapping[str, Any]) -> None:
    """Put values below the app's own configuration and above Celery's defaults, whenever that configuration loads.

    Celery's own `add_defaults` puts them above the configuration.

    Args:
        app: the app.
        values: Celery's settings by their lower-case names.
    """

    def insert(source: Any, **_: Any) -> None:
        source.maps.insert(len(source.maps) - 1, dict(values))

    if app.configured:
        insert(app.conf)
    app.on_after_configure.connect(insert, weak=False)


def is_device_pool(pool: Any) -> bool:
    """Return whether a pool, a pool's class or its path is `DevicePool` or made of it; imports nothing to find out."""
    return pool == POOL if isinstance(pool, str) else getattr(pool, "holds_devices", False)


def _leave_other_workers_alone(sender: Any, **_: Any) -> None:
    """Give a worker that was told to consume only other queues the pool that it would have had without `install`."""
    is_installed = set(WORKER_STEPS) <= sender.app.steps["worker"]
    chosen = sender.app.amqp.queues._consume_from  # None unless -Q chose
    if not is_installed or not chosen or not is_device_pool(sender.pool_cls):
        return
    if read_setting("sdtpu_queue", sender.app.conf) not in chosen:
        sender.pool_cls = get_implementation("prefork")
