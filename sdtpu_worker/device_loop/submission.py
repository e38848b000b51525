"""A job in the device loop: how far it is, and every way in which it can end.

Finished         the devices decoded its image
JobCancelled     its client or the worker did not want it any more
JobOverdue       its time was over
JobHandedOver    this loop stops before the job is done; another worker resumes it from its snapshot
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.device_loop.protocols import Job, Snapshot
from sdtpu_worker.device_loop.stages import JobStage

if TYPE_CHECKING:
    import numpy as np


class JobCancelled(Exception):
    """The job was taken off its slot before it was done, or was not wanted any more when it should have had one."""


class JobOverdue(Exception):
    """The job's time was over; `reason` says which time."""

    def __init__(self, reason: Overdue) -> None:
        super().__init__(reason.value)
        self.reason = reason


class JobHandedOver(Exception):
    """The job is not done here; another worker continues it.

    Args:
        snapshot: what the other worker resumes from; None to start from the beginning.
        suspect: the job had a slot on devices that hang or were lost, perhaps by its fault.
        had_slot: the job had a slot, so it does not expire any more.
    """

    def __init__(self, snapshot: Snapshot | None = None, suspect: bool = False, had_slot: bool = False) -> None:
        super().__init__("this worker stops before the job is done: another worker continues it")
        self.snapshot, self.suspect, self.had_slot = snapshot, suspect, had_slot


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        current, total: denoising steps.
        pending: the job has no slot, not yet or not at the moment.
        eta_s: seconds until its image is expected; None until there is an estimate.
        preview: `(h, w, 3) uint8`, a small image of the latents; None unless previews are on.
    """

    current: int
    total: int
    pending: bool
    description: str
    eta_s: float | None = None
    preview: np.ndarray | None = None


@dataclass(frozen=True)
class Finished:
    """How a job went through the devices.

    Attributes:
        pixels: `Image.pixels` of the engine, `(height, width, 3) uint8`.
        device, slot: where the image was decoded.
        occupied: slots in use in the tick that decoded the image.
        started_at: `time.monotonic()` when the job got its slot.
        finished_at: `time.monotonic()` when the tick that decoded the image had ended.
    """

    pixels: Any
    device: int
    slot: int
    occupied: int
    started_at: float
    finished_at: float


@dataclass(eq=False)
class Submission:
    """A job and the future of its `Finished`. The loop's thread changes it, any thread may read it.

    Attributes:
        may_start: asked until the job has its slot.
        snapshot: the job's last state off the devices, or on its way from there.
        alone: no other job may be on the devices with this one.
        steps_done: denoising steps as of the last tick that ended.
        moved: set when the job gets its slot, loses it or ends; the thread that waits for that clears it.
        started_at: when the job got its slot; None while it waits for its first one or for another try.
        device: where the job has, or had last, its slot; None before its first one.
        is_foreign: the snapshot to resume from was made elsewhere, so it proves nothing against a device here.
        failed_on: devices on which the job's image or state was not finite, or which failed while it was alone on them,
            with how often. Lost devices are none of them.
        failed_in_company: how often devices failed while other jobs were on them too, and no device was lost for it.
        announced: the loop has told of the job's start, and since then no other job had the devices for itself.
    """

    job: Job
    terms: Terms
    may_start: Callable[[], bool]
    snapshot: Snapshot | None
    progress: Progress
    arrived_at: float
    alone: bool
    steps_done: int
    future: Future[Finished] = field(default_factory=Future)
    moved: threading.Event = field(default_factory=threading.Event)
    started_at: float | None = None
    announced: bool = False
    device: int | None = None
    is_foreign: bool = False
    failed_on: Counter[int] = field(default_factory=Counter)
    failed_in_company: int = 0
    _stage: JobStage = JobStage.WAITING

    @classmethod
    def of(
        cls,
        job: Job,
        terms: Terms,
        may_start: Callable[[], bool],
        snapshot: Snapshot | None,
        alone: bool,
        now: float,
    ) -> Submission:
        """Return a job that waits for its first slot here, to start or to resume from a snapshot."""
        steps_done = snapshot.step if snapshot is not None else 0
        progress = Progress(steps_done, job.num_steps, True, "waiting for a slot")
        submission = cls(job, terms, may_start, snapshot, progress, now, alone, steps_done)
        submission.is_foreign = snapshot is not None
        submission.future.add_done_callback(lambda _: submission.moved.set())
        return submission

    @property
    def stage(self) -> JobStage:
        """Where the job stands; see `JobStage`. Takes the lock of the future: too slow for every job in every tick."""
        return JobStage.ENDED if self.future.done() else self._stage

    @property
    def has_slot(self) -> bool:
        """Whether the job is in a slot of a device."""
        return self.stage is JobStage.RUNNING

    @property
    def had_slot(self) -> bool:
        """Whether the job has, or had, a slot of a device: here, in an earlier try, or on another worker."""
        return self.started_at is not None or not self.terms.may_expire

    def start(self, now: float, device: int) -> None:
        """Note that the job gets a slot of a device, its first one or another one."""
        self.device = device
        self.started_at = now if self.started_at is None else self.started_at
        self._stage = JobStage.RUNNING

    def park(self, snapshot: Snapshot) -> None:
        """Note that the job's state leaves its slot."""
        self.snapshot, self._stage = snapshot, JobStage.PARKED

    def retry(self) -> None:
        """Go back to where the job can be tried again from: its snapshot, or the start."""
        self.snapshot = self.usable_snapshot()
        self.steps_done = self.snapshot.step if self.snapshot is not None else 0
        self.is_foreign &= self.snapshot is not None
        self.started_at, self._stage = None, JobStage.RETRYING
        self.terms = replace(self.terms, may_expire=False)
        self.progress = replace(self.progress, pending=True, description="waiting to be tried again")
        self.moved.set()

    def usable_snapshot(self) -> Snapshot | None:
        """Return the snapshot; None if there is none, or it is lost or not finite. May wait for its copy."""
        try:
            is_usable = self.snapshot is not None and self.snapshot.step and self.snapshot.finite
            return self.snapshot if is_usable else None
        except Exception:  # a copy from a device that failed raises whatever the device program raised
            return None

    def update_progress(self, steps_done: int, preview: np.ndarray | None = None) -> None:
        """Set how far the job is after a tick."""
        old, parked = self.progress, self.stage is JobStage.PARKED
        self.progress = Progress(  # not `replace`, which takes four times as long, for every job in every tick
            current=max(steps_done, old.current),
            total=old.total,
            pending=parked,
            description="waiting for a slot again" if parked else "denoising",
            eta_s=old.eta_s,
            preview=old.preview if preview is None else preview,
        )
        if self.progress.pending != old.pending:
            self.moved.set()

    def settle(self, end: Finished | Exception) -> bool:
        """End the job, unless it has ended already; return whether this call ended it. Any thread."""
        try:
            if isinstance(end, Exception):
                self.future.set_exception(end)
            else:
                self.future.set_result(end)
        except InvalidStateError:
            return False
        return True

    def follow(self, other: Submission) -> None:
        """End as another submission of the same job does."""

        def copy_end(done: Future[Finished]) -> None:
            error = done.exception()
            self.settle(error if isinstance(error, Exception) else done.result())

        other.future.add_done_callback(copy_end)


def is_of_job(snapshot: Snapshot, job: Job) -> bool:
    """Return whether a job can resume from a snapshot: it is at one of the job's steps, and has no NaN."""
    return 0 <= snapshot.step <= job.num_steps and snapshot.finite
