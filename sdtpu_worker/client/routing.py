"""Where a job goes: its queue and its priority, by Celery's own means.

What a caller names comes first, then annotations of the task, then the app's `task_routes`, then the settings of this
package. `generate.delay` follows these rules in every app; in an app with `install`, whatever sends the task by its
name does too (`send_task`, `celery call`, a signature of another process).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.app.amqp import AMQP
from celery.app.routes import Router
from celery.utils.imports import symbol_by_name

from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY, TASK_NAME, shard_queues, tenant_queue

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

_ANY_OTHER_TASK = "celery.backend_cleanup"
_DESTINATION = ("queue", "exchange", "routing_key")


def generation_route(
    app: Celery, args: Any, kwargs: Any, options: Mapping[str, Any], task: Any = None
) -> dict[str, Any]:
    """Return the options with which a job is sent: `queue` and `priority`, and whatever else its route has.

    Args:
        app: the app that sends it.
        args: of the task.
        kwargs: of the task; a `tenant` in it chooses one of the tenants' queues, unless the job goes to a queue of
            its own.
        options: what the caller named.
        task: the task, if it is known.
    """
    router = Router([route for route in app.amqp.routes if not isinstance(route, _TaskRoute)], app=app)
    route = _route_for_this_task(router, args or (), kwargs or {}, options, task)
    main = read_setting("sdtpu_queue", app.conf)
    queue = options.get("queue") or route.get("queue") or main
    tenant = kwargs.get("tenant") if isinstance(kwargs, Mapping) else None
    if name_of(queue) == main and not options.get("retries") and isinstance(tenant, str):
        queue = tenant_queue(main, tenant, read_setting("sdtpu_tenant_shards", app.conf))
    wanted = (options.get("priority"), route.get("priority"), app.conf.task_default_priority, DEFAULT_PRIORITY)
    return {**route, "queue": queue, "priority": next(value for value in wanted if value is not None)}


def device_queues(app: Celery) -> list[str]:
    """Return the queues of the task: those of the settings, and those to which the app routes it.

    Args:
        app: an app; the queues that it knows stay as they are.
    """
    names = shard_queues(read_setting("sdtpu_queue", app.conf), read_setting("sdtpu_tenant_shards", app.conf))
    task = app.tasks.get(TASK_NAME)
    try:
        routed = generation_route(app, (), {}, {"queue": getattr(task, "queue", None)}, task)["queue"]
    except Exception as exc:  # a router of the app's own, which wants arguments that only a job has
        logger.warning("the app's routes do not tell the queue of %s without a job: %r", TASK_NAME, exc)
        return names
    return list(dict.fromkeys([*names, name_of(routed)]))


def reporting_queues(app: Celery, queues: Iterable[str]) -> list[str]:
    """Return those of the task's queues under whose names workers publish their load: not the tenants' shards.

    Args:
        app: an app of a client or a worker.
        queues: what `device_queues` returned.
    """
    names = shard_queues(read_setting("sdtpu_queue", app.conf), read_setting("sdtpu_tenant_shards", app.conf))
    return [queue for queue in queues if queue not in names[1:]]


def name_of(queue: Any) -> str:
    """Return the name of a queue, which may be given as kombu's `Queue`."""
    return str(getattr(queue, "name", queue))


def route_the_task(app: Celery) -> None:
    """Have the app send the task by these rules, also by name; a second call changes nothing."""
    base = symbol_by_name(app.amqp_cls)
    if issubclass(base, RoutesTheTask):
        return
    app.amqp_cls = RoutingAMQP if base is AMQP else type(base.__name__, (RoutesTheTask, base), {})
    if "amqp" in vars(app):  # made already: other parts may hold it
        app.amqp.__class__ = app.amqp_cls
        vars(app.amqp).pop("router", None)


class RoutesTheTask:
    """Puts the rules of this module before an app's `task_routes`, which they ask first; mixed into `app.amqp`."""

    @property
    def routes(self) -> Sequence[Any]:
        """Return the app's routers, ours first."""
        app, others = self.app, super().routes  # type: ignore[attr-defined,misc]  # of AMQP, which this is mixed into
        return [_TaskRoute(app), *others]


class RoutingAMQP(RoutesTheTask, AMQP):
    """Celery's `app.amqp` with a route for the task."""


class _TaskRoute:
    """One of Celery's routers, for this task only."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __call__(
        self, name: str, args: Any = None, kwargs: Any = None, options: Any = None, task: Any = None, **_: Any
    ) -> dict[str, Any] | None:
        if name != TASK_NAME:
            return None
        return generation_route(self._app, args, kwargs, options or {}, task)


def _route_for_this_task(router: Router, args: Any, kwargs: Any, options: Any, task: Any) -> dict[str, Any]:
    """Return what the app's routes say of this task.

    A route that sends every task to one queue (`"*"`) is about an app's ordinary tasks, so its destination does not
    count: else it would send the jobs to the web tier's ordinary workers.
    """

    def look_up(name: str) -> dict[str, Any]:
        found = router.lookup_route(name, args, kwargs, options, task)
        return {"queue": found} if isinstance(found, str) else dict(found or {})

    route = look_up(TASK_NAME)
    if not any(key in route for key in _DESTINATION):
        return route
    try:
        other = look_up(_ANY_OTHER_TASK)
    except Exception:  # a router of the app's own, which was not made to be asked for this
        return route
    if all(route.get(key) == other.get(key) for key in _DESTINATION):
        return {key: value for key, value in route.items() if key not in _DESTINATION}
    return route
