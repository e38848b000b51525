"""The Celery task `sdtpu.generate`: one prompt, one image, one ordinary `AsyncResult`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from celery import Task, current_task, shared_task
from celery.canvas import Signature
from kombu.exceptions import OperationalError

from sdtpu_worker.client.admission import check_admission
from sdtpu_worker.client.backend_wait import bounded_wait
from sdtpu_worker.client.broker_errors import unavailable
from sdtpu_worker.client.once import send_once
from sdtpu_worker.client.options import check_options, plain_options, seconds_until
from sdtpu_worker.client.routing import generation_route, name_of
from sdtpu_worker.contract.queues import SENT_AT_HEADER, TASK_NAME
from sdtpu_worker.contract.request import GenerationRequest, check_arguments, draw_seed
from sdtpu_worker.errors import EngineUnavailable, InvalidRequest, Overloaded
from sdtpu_worker.images.bring import bring_pictures


class GenerateTask(Task):
    """Checks the parameters and draws a seed where the job is enqueued.

    Inside a worker (a chain's next task, a chord's body) nothing is raised: the preceding task must not fail for a
    bad parameter of this one, so the job is sent and fails by itself.

    Attributes:
        stand_in: draws a picture in place of a device worker, in tests; see `sdtpu_worker.testing.stand_in`.
        stand_in_worker: takes the jobs in place of the broker, in tests; see `sdtpu_worker.testing.stand_in_worker`.
    """

    abstract = True
    typing = False
    Request = "sdtpu_worker.worker.celery_request:DeviceRequest"
    stand_in: ClassVar[Callable[[Task, Sequence[Any], Mapping[str, Any]], dict[str, Any]] | None] = None
    stand_in_worker: ClassVar[Any] = None

    def signature(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Signature:
        """Build a signature; the parameters given so far are checked at once, so that a group fails as a whole.

        Pictures are stored at once, since a signature travels in a message.
        """
        if kwargs:
            kwargs = bring_pictures(self.app, kwargs)
        if not current_task:
            check_arguments(args or (), kwargs or {})
        return super().signature(args, kwargs, *rest, **options)

    subtask = signature

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Enqueue the job; see `GenerationRequest` for the parameters.

        The further parameter `tenant` chooses the job's queue, so that tenants are served in turn. A picture may be
        given as bytes, a PIL image or a `pathlib.Path`: it is put into the image store first. With an
        `idempotency_key`, a text of the caller's, a repeated call returns the first one's job, for as long as results
        are kept; a `task_id` that the caller chose does without it.

        Raises:
            InvalidRequest: a parameter is not allowed.
            StorageError: a picture could not be stored.
            QueueFull: too many jobs wait already (`sdtpu_max_queue`).
            DeadlineUnreachable: the job clearly could not have a slot before it `expires`.
            BrokerUnavailable: Redis cannot be reached or refuses the job.
        """
        args, kwargs = tuple(args or ()), bring_pictures(self.app, kwargs or {})
        key = kwargs.pop("idempotency_key", None)
        if key is not None and not options.get("task_id"):
            check_arguments(args, {**kwargs, "idempotency_key": key})

            def send(task_id: str) -> Any:
                return self.apply_async(args, kwargs, *rest, **{**options, "task_id": task_id})

            once = send_once if self.stand_in_worker is None else self.stand_in_worker.send_once
            return once(self.app, key, args, kwargs, send)
        options = plain_options({"expires": self.expires, **options})
        request = None if current_task else GenerationRequest.parse(args, kwargs)
        if kwargs.get("seed") is None:
            kwargs["seed"] = draw_seed()
        self._choose_queue_and_priority(args, kwargs, options)
        if request is not None:
            check_options(options)
        options["headers"] = {SENT_AT_HEADER: time.time(), **(options.get("headers") or {})}
        if self.stand_in_worker is not None:
            return self.stand_in_worker.send(self, args, kwargs, *rest, **options)
        if request is None or self.app.conf.task_always_eager:
            return self._send(args, kwargs, *rest, **options)
        if not options.get("retries"):
            self._check_admission(request, rest, options)
        with bounded_wait(self.app):
            return self._send(args, kwargs, *rest, **options)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Enqueue the job when Django's transaction commits, as the tasks of a Django app do."""
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Call `apply_async` with these arguments when Django's transaction commits."""
        from django.db import transaction

        transaction.on_commit(functools.partial(self.apply_async, *args, **kwargs))

    def map(self, it: Any) -> NoReturn:
        """Refuse: `map`, `starmap` and `chunks` call a task's code in one process of an ordinary worker.

        Raises:
            InvalidRequest: always, with the remedy.
        """
        raise InvalidRequest(
            "sdtpu.generate cannot be used with map, starmap or chunks, which run several jobs as one task without a"
            " device; write group(generate.s(prompt) for prompt in prompts), whose members share the devices' batch"
        )

    starmap = map

    def chunks(self, it: Any, n: int) -> NoReturn:
        """Refuse, as `map` does."""
        self.map(it)

    def _choose_queue_and_priority(self, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        """Fill in what the caller did not name: from annotations, the app's routes, the tenant and the settings."""
        for name in ("queue", "priority"):
            if options.get(name) is None:
                options[name] = getattr(self, name, None)  # an annotation
        app = self.app
        if options["queue"] is None and self.stand_in is not None:
            options["queue"] = app.conf.task_default_queue  # which the worker of a test consumes
        route = generation_route(app, args, kwargs, options, self)
        options.update({**route, **{name: value for name, value in options.items() if value is not None}})
        options["queue"] = route["queue"]  # of the tenant, where the caller named the queue of all

    def _check_admission(self, request: GenerationRequest, rest: Sequence[Any], options: Mapping[str, Any]) -> None:
        queue, priority = options["queue"], options["priority"]
        producer = options.get("producer") or options.get("publisher") or (rest[1] if len(rest) > 1 else None)
        check_admission(
            self.app,
            request,
            name_of(queue),
            priority,
            None if options.get("countdown") or options.get("eta") else seconds_until(self.app, options["expires"]),
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
    if self.request.called_directly:
        raise EngineUnavailable(
            "sdtpu.generate was called as a function, or by celery.map, celery.starmap or celery.chunks: that runs it"
            " in this process, which has no devices; call generate.delay(…), or send group(generate.s(…), …)"
        )
    if GenerateTask.stand_in is not None:
        return GenerateTask.stand_in(self, args, kwargs)
    from sdtpu_worker.worker.run_job import run_job

    return run_job(self, args, kwargs)
