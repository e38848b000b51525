"""What a device worker changes in the Celery app and in the Python process, each with its undoing."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from celery import signals
from celery.backends.redis import RedisBackend

from sdtpu_worker.delivery import transport
from sdtpu_worker.operations.prompt_guard import install_prompt_guard, remove_prompt_guard
from sdtpu_worker.worker.celery_request import count_failure_outside_task

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def change_app(app: Any, settings: Mapping[str, Any], connection_class: type | None = None) -> Iterator[None]:
    """Set what a device worker needs otherwise than Celery has it, and keep prompts out of the log.

    Args:
        app: the Celery app.
        settings: Celery's settings that are replaced.
        connection_class: of the app's broker connections; None for Celery's own.
    """
    conf = app.conf
    if conf.worker_cancel_long_running_tasks_on_connection_loss:
        logger.info("worker_cancel_long_running_tasks_on_connection_loss is ignored: jobs continue without Redis")
    settings = {
        **settings,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_enable_prefetch_count_reduction": False,  # the transport itself counts what is held
    }
    before = {name: conf[name] for name in settings}
    own_connection = vars(app.amqp).get("Connection")
    with warnings.catch_warnings():
        # Celery warns of the setting above, which it is about to turn on by default.
        warnings.filterwarnings("ignore", r"\s*In Celery 5\.1 we introduced", PendingDeprecationWarning)
        conf.update(settings)
        if connection_class is not None:
            app.amqp.Connection = connection_class
        install_prompt_guard(app, transport.logger)
        try:
            yield
        finally:
            remove_prompt_guard()
            conf.update(before)
            if own_connection is not None:
                app.amqp.Connection = own_connection
            elif connection_class is not None:
                del app.amqp.Connection


@contextlib.contextmanager
def share_result_backend(app: Any) -> Iterator[None]:
    """Have all threads share one Redis backend with its pool of connections, as `result_backend_thread_safe` does.

    With a backend for each thread, a worker would keep two connections for each job that it ever held at once. Other
    backends stay as they are: which of them threads may share is for the app to say, by that setting.
    """
    if not isinstance(app.backend, RedisBackend):
        yield
        return
    before, app._backend_cache = app._backend_cache, app._get_backend()
    try:
        yield
    finally:
        app._backend_cache = before


@contextlib.contextmanager
def watch_failures_outside_tasks() -> Iterator[None]:
    """Have Celery's signal of errors around a task's own code counted by the task's request."""
    signals.task_internal_error.connect(count_failure_outside_task, dispatch_uid="sdtpu_worker")
    try:
        yield
    finally:
        signals.task_internal_error.disconnect(dispatch_uid="sdtpu_worker")


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Have the garbage collector rest while modules are imported: nothing of them is garbage, and it looks often."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def freeze_start_up() -> Iterator[None]:
    """Have the garbage collector never look again at what start-up made: with JAX that stops the process for 0.2 s.

    The second collection has the collector take note of how little is left. Looking at that is cheap, so it does so
    five times as often as Python would: the memory of a job that failed, with all of its traceback, is free soon.
    """
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.collect()
    gc.set_threshold(young, middle, 2)
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(young, middle, old)
