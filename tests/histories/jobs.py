"""A job in a worker process: the package's own request and job, around devices that only take time.

What is not the package's stands in for Celery: the few lines in which a task's end is stored and its message
acknowledged.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery import Celery
from redis.exceptions import ConnectionError as RedisConnectionError

from sdtpu_worker.aggregator.jobs import Overdue
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.submission import JobHandedOver, JobOverdue, Submission
from sdtpu_worker.errors import DeliveryLimitExceeded
from sdtpu_worker.worker.celery_request import DeviceRequest, answer_directly
from sdtpu_worker.worker.job import DeviceJob
from sdtpu_worker.worker.job_ends import JobLeft
from tests.histories.messages import TASK

if TYPE_CHECKING:
    from tests.histories.worker import WorkerProcess

APP = Celery("histories", set_as_current=False)
PARAMETERS = GenerationRequest.parse(("x",), {"seed": 1})
MAX_DELIVERIES = 3
SLOTS = 2
"""How many jobs are on a worker's devices at once: fewer than it holds."""
_SNAPSHOT_AFTER_S = 1.0
"""A job that has had its slot for less time has no state yet that could be handed over."""


class Job(DeviceJob):
    """The package's job, on devices that only take time; its pauses are in virtual time.

    Args:
        process: the worker that has it.
        message: its message, just delivered.
    """

    def __init__(self, process: WorkerProcess, message: Any) -> None:
        task = SimpleNamespace(
            name=TASK, backend=process, ignore_result=False, send_events=False, resultrepr_maxsize=100,
            store_errors_even_if_ignored=False,
        )  # fmt: skip
        request = DeviceRequest(message, app=APP, hostname=process.host, task=task)
        answer_directly(request)
        loop: Any = SimpleNamespace()
        super().__init__(
            request, loop, deliveries=process.deliveries, max_deliveries=MAX_DELIVERIES,
            is_stopping=lambda: process.is_stopping,
        )  # fmt: skip
        self._process, self._tag = process, message.delivery_tag

    def run(self) -> None:
        """Do what the pool, Celery and `run_job` do with a message."""
        process = self._process
        try:
            if left := self.find_early_end():
                raise left
            with self.in_celerys_words():
                facts = self.recall(PARAMETERS)
                process.world.facts.on_recall(process, self.task_id, facts, self._tag)
                self._be_on_devices()
            process.store(self.task_id, "SUCCESS")
        except JobLeft as left:
            self.leave(left)
        except DeliveryLimitExceeded:
            process.store(self.task_id, "FAILURE")
            self.request.acknowledge()
        else:
            self.request.acknowledge()
        self.release()

    def _be_on_devices(self) -> None:
        """Wait for a slot, and take the job's time there, unless the worker stops.

        Raises:
            JobHandedOver: it stops.
            JobOverdue: the job expires before it has a slot.
        """
        process = self._process
        job: Any = SimpleNamespace(num_steps=1)
        submission = Submission.of(job, self.terms(), self.may_start, None, False, process.monotonic())
        while True:
            if submission.terms.may_expire and submission.terms.expires_at <= process.monotonic():  # as the policy
                raise JobOverdue(Overdue.EXPIRED)
            if len(process.on_devices) < SLOTS:
                break
            self._stay(0.5, submission)
        submission.start(process.monotonic(), 0)
        process.on_devices.add(self._tag)
        try:
            process.world.facts.on_slot(process, self.task_id, self._tag)
            with contextlib.suppress(RedisConnectionError):  # the recorder of starts does not wait for Redis
                process.deliveries.record_starts([self.task_id])
            until = process.monotonic() + process.world.job_s[self.task_id]
            while process.is_hung or process.monotonic() < until - 1e-6:
                self._stay(min(1.0, max(0.1, until - process.monotonic())), submission)
        finally:
            process.on_devices.discard(self._tag)

    def _stay(self, seconds: float, submission: Submission) -> None:
        """Wait, unless the worker stops.

        Raises:
            JobHandedOver: it does.
        """
        process, started_at = self._process, submission.started_at
        if process.is_stopping:
            is_begun = started_at is not None and process.monotonic() - started_at >= _SNAPSHOT_AFTER_S
            snapshot: Any = SimpleNamespace(to_bytes=lambda: b"steps") if is_begun else None
            raise JobHandedOver(snapshot, had_slot=submission.had_slot)
        process.sleep(seconds)

    def _pause(self) -> None:
        self._process.sleep(1.0)


def receive(process: WorkerProcess, message: Any) -> None:
    """Do what Celery's task consumer does with a message, in the main thread."""
    job = Job(process, message)
    process.tasks[message.delivery_tag] = job.task_id
    if job.request.expires and job.request.revoked():
        return
    process.deliveries.mark_running(message.delivery_tag)
    process.spawn(f"job-{job.task_id}-{len(process.tasks)}", partial(job.run))
