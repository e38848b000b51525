"""A job that asks for an equal one's image: what it knows, what it tells others, and how it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.aggregator.jobs import Overdue
from sdtpu_worker.device_loop.protocols import ServableJob
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue, Progress
from sdtpu_worker.reuse.notes import Lead, token_of
from sdtpu_worker.reuse.stored_image import Drawn
from sdtpu_worker.worker.job_control import JobControl
from sdtpu_worker.worker.job_record import JobRecord


@dataclass(frozen=True)
class Turn:
    """A job's turn under its reuse key.

    Attributes:
        found: the image of an equal job; None for a job that has to draw.
        keep: called when the job has stored its image, with that and the time before it was stored.
    """

    found: Drawn | None = None
    keep: Callable[[Drawn, float], None] = lambda drawn, began_at: None


@dataclass
class Entry:
    """A prepared job that asks for an equal one's image.

    Attributes:
        key: its reuse key.
        job: as the engine prepared it.
        image_format: of its image.
        text: the parameters that a PNG of it says.
        control: what its caller wants besides.
        record: of the job.
        token: tells it from other jobs.
        expires_at: when it expires without a slot, in seconds since 1970.
        leads: it has the lead.
        waits: it has waited for another job.
    """

    key: str
    job: ServableJob
    image_format: str
    text: Mapping[str, Any]
    control: JobControl
    record: JobRecord
    token: str = field(init=False)
    expires_at: float = field(init=False)
    leads: bool = False
    waits: bool = False

    def __post_init__(self) -> None:
        self.token = token_of(self.job.task_id)
        self.expires_at = time.time() + self.control.terms.expires_at - time.monotonic()

    def lead(self) -> Lead:
        """Return the job's lead as it is now. Any thread."""
        submission, priority = self.record.submission, self.control.terms.priority
        if submission is None:
            return Lead(self.token, priority, self.expires_at, total=self.job.num_steps)
        progress, had_slot = submission.progress, submission.started_at is not None
        steps = progress.current, progress.total
        return Lead(self.token, priority, self.expires_at, had_slot, progress.pending, *steps, progress.eta_s)

    def check_wanted(self, leader: Lead, is_draining: Callable[[], bool]) -> None:
        """End the job while it waits, if it is not wanted any more or its worker stops.

        A slot of the leader counts as one of its own: it does not expire any more.

        Raises:
            JobCancelled, JobOverdue, JobHandedOver: as the device loop does.
        """
        terms = self.control.terms
        if not self.control.may_start():
            raise JobCancelled
        if terms.may_expire and not leader.had_slot and time.monotonic() >= terms.expires_at:
            raise JobOverdue(Overdue.EXPIRED)
        if is_draining():
            raise JobHandedOver

    def publisher(self, every_s: float) -> Callable[[Lead], None]:
        """Return what publishes how far a leader is as the progress of this job, which waits for it.

        Args:
            every_s: seconds between two states; 0 for none.
        """
        next_at, published = 0.0, None

        def publish(leader: Lead) -> None:
            nonlocal next_at, published
            now = time.monotonic()
            if self.control.publish is None or not every_s or now < next_at or leader == published:
                return
            next_at, published = now + every_s, leader
            state = "an equal job waits for a slot" if leader.pending else "an equal job is denoising"
            current = min(leader.current, leader.total)
            self.control.publish(Progress(current, leader.total, leader.pending, state, leader.eta_s))

        return publish
