"""What a job's caller wants besides the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.device_loop.submission import Progress
from sdtpu_worker.worker.job_record import JobRecord


@dataclass(frozen=True)
class JobControl:
    """What a job's caller wants besides the image.

    Attributes:
        terms: priority, deadline and limits.
        may_start: asked, in any thread, again and again, until the job has its slot.
        publish: called with the job's progress, in the caller's thread; None to publish none.
        snapshot: the bytes of a snapshot to continue from.
        alone: the job shares the devices with no other job.
        record: where the job is measured; None for a record of its own.
        tenant: whose job it is, as its client says; None for nobody's.
    """

    terms: Terms = field(default_factory=Terms)
    may_start: Callable[[], bool] = lambda: True
    publish: Callable[[Progress], None] | None = None
    snapshot: bytes | None = None
    alone: bool = False
    record: JobRecord | None = None
    tenant: str | None = None
