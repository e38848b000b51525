"""What is measured of one job in this worker, from its receipt to its end: for its result, its log line, the figures.

A job has one record. The job's own thread fills it; the pool closes it when the job has left this worker.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.contract.queues import SENT_AT_HEADER, read_sent_at
from sdtpu_worker.device_loop.submission import Finished, Submission
from sdtpu_worker.errors import GenerationFailed
from sdtpu_worker.operations.figures import Figures
from sdtpu_worker.operations.tracing import DeviceTime

logger = logging.getLogger(__name__)

_OF_HOST = {"prepare": "sdtpu_prepare_seconds", "encode": "sdtpu_encode_seconds", "store": "sdtpu_store_seconds"}


@dataclass(eq=False)
class JobRecord:
    """The times of a job, on `time.monotonic()`'s clock, and how it ended.

    Attributes:
        task_id: names the job.
        received_at: when this worker's pool took the job.
        waited_before_s: seconds between the client's call and that, if the client has sent the time of its call.
        queue: where its message came from; empty if that is not known.
        stages: `(start, end)` of each part of the host's work that has ended, by name.
        submission: the job in the device loop; None until it is prepared.
        finished: how it went through the devices; None unless it has pixels.
        num_slots: slots of the host when the job ended.
        stored_at: when its image was stored; None unless it is.
        reused: its image is that of an equal job.
        came_from: how it came from another worker, as `redelivered` in `operations.metric_table.OUTCOMES` says; empty
            if it did not.
        outcome, reason: how the job ended, as in `operations.metric_table.OUTCOMES`.
    """

    task_id: str
    received_at: float = field(default_factory=time.monotonic)
    waited_before_s: float = 0.0
    queue: str = ""
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)
    submission: Submission | None = None
    finished: Finished | None = None
    num_slots: int = 0
    stored_at: float | None = None
    reused: bool = False
    came_from: str = ""
    outcome: str = "lost_hold"
    reason: str = ""

    @classmethod
    def of(cls, task_id: str, sent_at: float | None, queue: str = "") -> JobRecord:
        """Return the record of a job that has just come.

        Args:
            task_id: names the job.
            sent_at: `time.time()` when the client sent it, on the client's clock; None if that is not known.
            queue: where its message came from.
        """
        return cls(task_id, waited_before_s=0.0 if sent_at is None else max(0.0, time.time() - sent_at), queue=queue)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of the host's work."""
        started_at = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = started_at, time.monotonic()

    @property
    def started_at(self) -> float | None:
        """When the job got its slot; None while it has had none here."""
        if self.finished is not None:
            return self.finished.started_at
        return self.submission.started_at if self.submission is not None else None

    def queued_s(self, now: float) -> float:
        """Return the seconds from the client's call to the slot; up to `now` where the job has had none."""
        return self.waited_before_s + (self.started_at or now) - self.received_at

    def device_s(self, now: float) -> float:
        """Return the seconds in the slot, up to `now` where the job has no pixels."""
        if self.started_at is None:
            return 0.0
        return (self.finished.finished_at if self.finished is not None else now) - self.started_at

    def total_s(self, now: float) -> float:
        """Return the seconds from the client's call to the stored image; up to `now` where it is not stored."""
        return self.waited_before_s + (self.stored_at or now) - self.received_at

    def way(self, error: BaseException | None) -> DeviceTime:
        """Return how the job, which has just left the device loop, went through it, for its spans."""
        submission, now = self.submission, time.monotonic()
        facts: dict[str, Any] = {"messaging.message.id": self.task_id}
        if submission is not None and submission.device is not None:
            facts |= {"sdtpu.device": submission.device, "sdtpu.steps_done": submission.steps_done}
        if self.finished is not None:
            facts |= {"sdtpu.slot": self.finished.slot, "sdtpu.neighbours": self.finished.occupied - 1}
        is_failure = isinstance(error, GenerationFailed)
        if error is not None and not is_failure:
            facts["sdtpu.left_by"] = type(error).__name__
        arrived_at = submission.arrived_at if submission is not None else now
        ended_at = self.finished.finished_at if self.finished is not None else now
        return DeviceTime(arrived_at, self.started_at, ended_at, facts, type(error).__name__ if is_failure else None)

    def to_json(self, now: float) -> dict[str, Any]:
        """Return the facts of the job's log line; seconds up to `now` where something has not come to its end."""
        facts: dict[str, Any] = {
            "outcome": self.outcome,
            "reason": self.reason,
            "waited_s": round(self.queued_s(now), 4),
            "device_s": round(self.device_s(now), 4),
        }
        if self.submission is not None:
            facts |= {"steps": self.submission.steps_done, "device": self.submission.device}
        if self.finished is not None:
            facts |= {
                "device": self.finished.device,
                "slot": self.finished.slot,
                "neighbours": self.finished.occupied - 1,
                "slots": self.num_slots,
            }
        return facts


def record_of(request: Any) -> JobRecord:
    """Return the record of the job of one of Celery's requests, which has just come."""
    sent_at = read_sent_at(request.request_dict.get(SENT_AT_HEADER))
    return JobRecord.of(request.id, sent_at, (request.delivery_info or {}).get("routing_key") or "")


def log_end(record: JobRecord) -> None:
    """Write the one line that every job has in the log, at INFO."""
    facts = record.to_json(time.monotonic())
    reason = f" ({record.reason})" if record.reason else ""
    if record.started_at is None:
        where = "had no slot"
    else:
        where = f"{facts['steps']} steps in {facts['device_s']:.2f} s on device {facts['device']}"
        if record.finished is not None:
            where += f" slot {facts['slot']}, with {facts['neighbours']} neighbours in {facts['slots']} slots"
    logger.info("task %s %s%s: waited %.2f s, %s", record.task_id, record.outcome, reason, facts["waited_s"], where,
                extra={"job": facts})  # fmt: skip


def count_end(record: JobRecord, figures: Figures) -> None:
    """Add a job that has left this worker to the figures; its end comes last, so what is counted has its times too."""
    if record.started_at is not None:
        figures.observe("sdtpu_request_queue_time_seconds", record.queued_s(0.0))
    if record.finished is not None:
        figures.observe("sdtpu_request_inference_time_seconds", record.device_s(0.0))
    if record.stored_at is not None:
        figures.observe("sdtpu_e2e_request_latency_seconds", record.total_s(record.stored_at))
    for name, (started_at, ended_at) in record.stages.items():
        if name in _OF_HOST:
            figures.observe(_OF_HOST[name], ended_at - started_at)
    if record.came_from:
        figures.count("sdtpu_requests_total", "redelivered", record.came_from)
    figures.count("sdtpu_requests_total", record.outcome, record.reason)
