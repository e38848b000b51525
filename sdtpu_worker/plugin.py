"""`install(app)`: turns a Celery app into one whose worker can serve. It wires; `worker/steps.py` does the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import click
from celery import Celery, _state, signals
from celery.concurrency import get_implementation
from click.core import ParameterSource

from sdtpu_worker.client.routing import device_queues, route_the_task
from sdtpu_worker.config import read_setting
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.settings_guard import guard_settings

POOL = "sdtpu_worker.pool:DevicePool"
WORKER_STEPS = ("sdtpu_worker.worker.steps:DeviceWorkerStep",)
CONSUMER_STEPS = ("sdtpu_worker.worker.steps:DeliveryStep", "sdtpu_worker.worker.steps:UrgentPrefetchStep")
"""By name, so that a web process which installs the app imports nothing of the worker."""
_DEFAULTS = {
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
}


def install(app: Celery) -> Celery:
    """Turn a Celery app into one that can send jobs, and whose worker can serve: the task, its route, the boot steps.

    Safe to call in the module that web processes and ordinary workers share: it only sets defaults, which the app's
    own configuration overrides, and imports no JAX. The app's workers stay ordinary ones, with the pool and the queues
    that they had, but for the device worker: the one that is told to consume a queue of the task (`-Q sdtpu`), or to
    have the pool `DevicePool` (`worker_pool`). Unless there is a default app already, this app becomes the default, so
    that `generate.delay` finds it from every thread of a web server.

    Args:
        app: the app.

    Returns:
        The app.
    """
    import sdtpu_worker.client.task  # noqa: F401  registers the shared task

    set_defaults(app, _DEFAULTS)
    guard_settings(app)
    route_the_task(app)
    app.steps["worker"].update(WORKER_STEPS)
    app.steps["consumer"].update(CONSUMER_STEPS)
    signals.celeryd_init.connect(_hold_warnings, dispatch_uid="sdtpu_worker")
    signals.worker_init.connect(_choose_pool, dispatch_uid="sdtpu_worker")
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


def is_device_worker(app: Celery, has_device_pool: bool) -> bool:
    """Return whether a worker of the app, as it was started, is to hold devices.

    Args:
        app: the worker's app; `-Q` and `-X` have chosen among its queues.
        has_device_pool: whether `worker_pool` or `-P` names a device pool.
    """
    queues, ours = app.amqp.queues, set(device_queues(app))
    chosen = queues._consume_from  # None unless -Q chose
    if chosen is not None:
        return not ours.isdisjoint(chosen)
    return has_device_pool or ours.issuperset(queues.consume_from)


def given_options(*names: str) -> list[str]:
    """Return which of these options of `celery worker` stand on the command line, by click's names for them."""
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    return [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def _hold_warnings(instance: Any, conf: Any, **_: Any) -> None:
    """Have the log of a worker, where it is JSON, get what Celery warns of before it sets the log up."""
    if not set(WORKER_STEPS) <= instance.app.steps["worker"]:
        return
    with contextlib.suppress(ConfigurationError):  # the boot step refuses it with the reason
        if read_setting("sdtpu_log_format", conf) == "json":
            from sdtpu_worker.operations.log_format import hold_warnings

            hold_warnings()


def _choose_pool(sender: Any, **_: Any) -> None:
    """Give a device worker the device pool, and any other worker the pool that it would have had without `install`."""
    app = sender.app
    if not set(WORKER_STEPS) <= app.steps["worker"]:
        return
    pool = get_implementation(sender.pool_cls)
    try:
        is_wanted = is_device_worker(app, is_device_pool(pool))
    except ConfigurationError:  # the boot step refuses it with the reason
        return
    if not is_wanted:
        if is_device_pool(pool):
            sender.pool_cls = get_implementation("prefork")
    elif not is_device_pool(pool) and not _is_asked_for(app, pool):
        sender.pool_cls = get_implementation(POOL)


def _is_asked_for(app: Celery, pool: Any) -> bool:
    """Return whether this very worker was given another pool, by `-P` or by the code that made it.

    A `-P prefork` is what start scripts say by habit: it does not count, and the boot step logs that.
    """
    is_code = click.get_current_context(silent=True) is None
    by_default = [get_implementation(app.conf.worker_pool), *([] if is_code else [get_implementation("prefork")])]
    return pool not in by_default
