"""The Celery task `sdtpu.generate`: one prompt, one image, one ordinary `AsyncResult`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from celery import Task, current_task, shared_task
from celery.app.routes import Router
from celery.canvas import Signature
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.exceptions import OperationalError

from sdtpu_worker.client.admission import check_admission
from sdtpu_worker.client.backend_wait import bounded_wait
from sdtpu_worker.client.broker_errors import unavailable
from sdtpu_worker.client.routing import generation_route, name_of
from sdtpu_worker.contract.queues import SENT_AT_HEADER, TASK_NAME
from sdtpu_worker.contract.request import GenerationRequest, check_arguments, draw_seed
from sdtpu_worker.errors import InvalidRequest, Overloaded


class GenerateTask(Task):
    """Checks the parameters and draws a seed where the job is enqueued.

    Inside a worker (a chain's next task, a chord's body) nothing is raised: the preceding task must not fail for a
    bad parameter of this one, so the job is sent and fails by itself.
    """

    abstract = True
    typing = False
    Request = "sdtpu_worker.worker.celery_request:DeviceRequest"

    def signature(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Signature:
        """Build a signature; the parameters given so far are checked at once, so that a group fails as a whole."""
        if not current_task:
            check_arguments(args or (), kwargs or {})
        return super().signature(args, kwargs, *rest, **options)

    subtask = signature

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Enqueue the job; see `GenerationRequest` for the parameters.

        The further parameter `tenant` chooses the job's queue, so that tenants are served in turn.

        Raises:
            InvalidRequest: a parameter is not allowed.
            QueueFull: too many jobs wait already (`sdtpu_max_queue`).
            DeadlineUnreachable: the job clearly could not have a slot before it `expires`.
            BrokerUnavailable: Redis cannot be reached or refuses the job.
        """
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        request = None if current_task else GenerationRequest.parse(args, kwargs)
        if kwargs.get("seed") is None:
            kwargs["seed"] = draw_seed()
        self._choose_queue_and_priority(args, kwargs, options)
        options["headers"] = {SENT_AT_HEADER: time.time(), **(options.get("headers") or {})}
        if request is None or self.app.conf.task_always_eager:
            return self._send(args, kwargs, *rest, **options)
        if not options.get("retries"):
            self._check_admission(request, rest, options)
        with bounded_wait(self.app):
            return self._send(args, kwargs, *rest, **options)

    def _choose_queue_and_priority(self, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        """Fill in what the caller did not name: from annotations, the app's routes, the tenant and the settings."""
        for name in ("queue", "priority"):
            if options.get(name) is None:
                options[name] = getattr(self, name, None)  # an annotation
        app = self.app
        route = generation_route(app, Router(app.amqp.routes, app=app), args, kwargs, options, self)
        options.update({**route, **{name: value for name, value in options.items() if value is not None}})
        options["queue"] = route["queue"]  # of the tenant, where the caller named the queue of all

    def _check_admission(self, request: GenerationRequest, rest: Sequence[Any], options: Mapping[str, Any]) -> None:
        queue, priority = options["queue"], options["priority"]
        producer = options.get("producer") or options.get("publisher") or (rest[1] if len(rest) > 1 else None)
        check_admission(
            self.app,
            request,
            name_of(queue),
            priority if isinstance(priority, int) else 0,
            None if options.get("countdown") or options.get("eta") else _seconds_left(self, options),
            producer,
        )

    def _send(self, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        try:
            return super().apply_async(args, kwargs, *rest, **options)
        except (OperationalError, ConnectionError) as exc:
            raise unavailable(self.app, exc) from exc
        except RuntimeError as exc:
            if "Retry limit exceeded" not in str(exc):
                raise
            raise unavailable(self.app, exc, at_backend=True) from exc


@shared_task(
    name=TASK_NAME, base=GenerateTask, bind=True, acks_late=True, track_started=False,
    throws=(InvalidRequest, Overloaded),  # the client's; every other failure is an error for the operator to see
)  # fmt: skip
def generate(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Generate one image; parameters as `GenerationRequest`, result as `GenerationResult` in JSON.

    It stores the state STARTED itself (`DeviceJob.begin`): Celery does so before anybody has looked whether a
    redelivered job has an end already, and would replace a FAILURE.
    """
    from sdtpu_worker.worker.run_job import run_job

    return run_job(self, args, kwargs)


def _seconds_left(task: Task, options: Mapping[str, Any]) -> float | None:
    """Return how long a job is wanted, of any form of `expires` that Celery knows; None for ever or unknown."""
    expires = options.get("expires", task.expires)
    try:
        if isinstance(expires, str):
            expires = maybe_iso8601(expires)
        if isinstance(expires, datetime):
            return (maybe_make_aware(expires) - task.app.now()).total_seconds()
        return float(expires) if isinstance(expires, int | float) else None
    except (TypeError, ValueError, OverflowError):
        return None  # Celery's to refuse
