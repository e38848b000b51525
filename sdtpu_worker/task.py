"""The Celery task `sdtpu.generate`: one prompt, one image, one ordinary `AsyncResult`."""

from __future__ import annotations

import time
from typing import Any

from celery import Task, current_task, shared_task
from celery.canvas import Signature
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url

from sdtpu_worker.config import read_setting
from sdtpu_worker.errors import BrokerUnavailable
from sdtpu_worker.request import DEFAULT_PRIORITY, GenerationRequest, check_arguments, draw_seed

TASK_NAME = "sdtpu.generate"
SENT_AT_HEADER = "sdtpu_sent_at"


class GenerateTask(Task):
    """Checks the parameters and draws a seed where the job is enqueued.

    Inside a worker (a chain's next task, a chord's body) nothing is raised: the preceding task must not fail for a
    bad parameter of this one, so the job is sent and fails by itself.
    """

    abstract = True
    typing = False
    Request = "sdtpu_worker.job:DeviceRequest"

    def signature(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Signature:
        """Build a signature; the parameters given so far are checked at once, so that a group fails as a whole."""
        if not current_task:
            check_arguments(args or (), kwargs or {})
        return super().signature(args, kwargs, *rest, **options)

    subtask = signature

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Enqueue the job; see `GenerationRequest` for the parameters.

        Raises:
            InvalidRequest: a parameter is not allowed.
            BrokerUnavailable: Redis cannot be reached.
        """
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        if not current_task:
            GenerationRequest.parse(args, kwargs)
        if kwargs.get("seed") is None:
            kwargs["seed"] = draw_seed()
        options.setdefault("queue", read_setting("sdtpu_queue", self.app.conf))
        if options.get("priority") is None:
            default = self.app.conf.task_default_priority
            options["priority"] = DEFAULT_PRIORITY if default is None else default
        options["headers"] = {SENT_AT_HEADER: time.time(), **(options.get("headers") or {})}
        try:
            return super().apply_async(args, kwargs, *rest, **options)
        except (OperationalError, ConnectionError) as exc:
            raise _unavailable(self.app, str(exc)) from exc
        except RuntimeError as exc:
            if "Retry limit exceeded" not in str(exc):
                raise
            raise _unavailable(self.app, "the result backend did not answer") from exc


@shared_task(name=TASK_NAME, base=GenerateTask, bind=True, acks_late=True, track_started=True)
def generate(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Generate one image; parameters as `GenerationRequest`, result as `GenerationResult` in JSON."""
    from sdtpu_worker.job import CRASHES_TO_RUN_ALONE, current_job
    from sdtpu_worker.serving import JobControl, current

    request = GenerationRequest.parse(args, kwargs).with_seed(self.request.id)
    sent_at = self.request.get(SENT_AT_HEADER)
    sent_at = sent_at if isinstance(sent_at, int | float) and not isinstance(sent_at, bool) else None
    serving, job = current(), current_job()
    if job is None:
        return serving.run(self.request.id, request, sent_at).to_json()
    with job.in_celerys_words():
        facts = job.recall(self, request)
        control = JobControl(
            job.terms(),
            job.may_start,
            lambda progress: job.report(self, progress),
            facts.snapshot,
            alone=len(facts.died_on) >= CRASHES_TO_RUN_ALONE,
        )
        return serving.run(self.request.id, request, sent_at, control).to_json()


def _unavailable(app: Any, cause: str) -> BrokerUnavailable:
    url = maybe_sanitize_url(app.conf.broker_url or "redis://localhost:6379/0")
    return BrokerUnavailable(
        f"the job was not enqueued: Redis at {url} cannot be reached ({cause}); start it, or correct broker_url and"
        " result_backend"
    )
