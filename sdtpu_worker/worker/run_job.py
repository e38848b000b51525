"""The body of the task `sdtpu.generate`: from a task's arguments to its result, in the thread that runs the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.worker.celery_request import current_job
from sdtpu_worker.worker.job_control import JobControl

if TYPE_CHECKING:
    from celery import Task

CRASHES_TO_RUN_ALONE = 2
"""A job that was on the devices of this many workers when they died shares the devices with no other job."""


def run_job(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Generate and store the image of the job that a task's request carries.

    Args:
        task: the bound task; the pool runs it in the job's thread.
        args: of the task.
        kwargs: of the task.

    Returns:
        A `GenerationResult` in JSON.

    Raises:
        InvalidRequest: an argument is not allowed, or this worker cannot serve it.
        EngineUnavailable: no `DevicePool` runs this task.
        Exception: whatever else ends the job; see `Serving.run` and `DeviceJob.in_celerys_words`.
    """
    request = GenerationRequest.parse(args, kwargs).with_seed(task.request.id)
    job = current_job.get()
    if job is None or job.task_id != task.request.id:
        raise EngineUnavailable(
            "no engine runs in this process: sdtpu.generate runs only in a worker with the pool"
            " sdtpu_worker.pool:DevicePool (call sdtpu_worker.install(app), then `celery worker -Q sdtpu`)"
        )
    with job.in_celerys_words():
        facts = job.recall(request)
        job.begin(task)
        control = JobControl(
            job.terms(),
            job.may_start,
            lambda progress: job.publish_progress(task, progress),
            facts.snapshot,
            alone=len(facts.died_on) >= CRASHES_TO_RUN_ALONE,
            record=job.record,
            tenant=kwargs.get("tenant"),
        )
        return job.serving.run(task.request.id, request, control=control).to_json()
