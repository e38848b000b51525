"""A job in the device loop's hands: how far it is, and every way in which it can end.

JobCancelled     somebody did not want it any more
JobOverdue       its time was over
JobHandedOver    this loop stops before it was done; another one goes on with its state
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Any

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.device_loop.protocols import Job


class JobCancelled(Exception):
    """The job was taken off its slot before it was done, or was not wanted any more when it should have had one."""


class JobOverdue(Exception):
    """The job's time was over; `reason` says which time."""

    def __init__(self, reason: Overdue) -> None:
        super().__init__(reason.value)
        self.reason = reason


class JobHandedOver(Exception):
    """The job was not done here and is another worker's now.

    Args:
        snapshot: the state to go on from, None to start.
        suspect: it had a slot on devices that hang or were lost, perhaps by its fault.
    """

    def __init__(self, snapshot: Any | None = None, suspect: bool = False) -> None:
        super().__init__("this worker stops: another one goes on with the job")
        self.snapshot, self.suspect = snapshot, suspect


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        current, total: denoising steps.
        pending: it has no slot, not yet or not at the moment.
        eta_s: seconds until its picture is expected; None until there is an estimate.
        preview: `(h, w, 3) uint8`, a small picture of the latents, if previews are on.
    """

    current: int
    total: int
    pending: bool
    description: str
    eta_s: float | None = None
    preview: Any = None


@dataclass(frozen=True)
class Finished:
    """One job's way through the device.

    Attributes:
        pixels: `(height, width, 3) uint8`.
        occupied: slots in use in the tick that finished the job.
        started_at, finished_at: `time.monotonic()` of its slot and of its pixels' arrival on the host.
    """

    pixels: Any
    device: int
    slot: int
    occupied: int
    started_at: float
    finished_at: float


@dataclass(eq=False)
class Submission:
    """A job and the future of its `Finished`; owned by the loop's thread, read from any.

    Attributes:
        may_start: asked until it has its slot.
        snapshot: its last state off the devices.
        moved: set when it gets a slot, loses it or ends; whoever waits for that clears it.
        started_at: when it got its slot; None again while it waits for another try.
        parked: it had a slot and waits for another one, with its state off the devices.
        announced: it has had a slot here, since when no other job has had the devices for itself.
        steps_done: as of the last tick that ended.
    """

    job: Job
    terms: Terms
    may_start: Callable[[], bool]
    snapshot: Any
    progress: Progress
    arrived_at: float = 0.0
    alone: bool = False
    future: Future[Finished] = field(default_factory=Future)
    moved: threading.Event = field(default_factory=threading.Event)
    started_at: float | None = None
    parked: bool = False
    announced: bool = False
    steps_done: int = 0

    @property
    def has_slot(self) -> bool:
        """Whether it is on a device."""
        return self.started_at is not None and not self.parked

    def usable_snapshot(self) -> Any | None:
        """Return its state off the devices, or None if there is none or it was lost with them; may wait for a copy."""
        try:
            return self.snapshot if self.snapshot is not None and self.snapshot.step else None
        except Exception:  # whatever the copy from a broken device raises
            return None

    def report(self, steps_done: int, preview: Any = None) -> None:
        """Say how far it is after a tick."""
        old = self.progress
        self.progress = replace(
            old,
            current=max(steps_done, old.current),
            pending=self.parked,
            description="waiting for a slot again" if self.parked else "denoising",
            preview=old.preview if preview is None else preview,
        )
        if self.progress.pending != old.pending:
            self.moved.set()

    def start_over(self) -> None:
        """Go back to where it can be tried again from: its last state off the devices, or the start."""
        self.snapshot = self.usable_snapshot()
        self.steps_done = self.snapshot.step if self.snapshot is not None else 0
        self.started_at, self.parked = None, False
        self.progress = replace(self.progress, pending=True, description="waiting to be tried again")
        self.moved.set()

    def settle(self, end: Finished | Exception) -> bool:
        """End the job, unless it has ended already; return whether it did. Any thread."""
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
            self.settle(done.exception() or done.result())  # type: ignore[arg-type]

        other.future.add_done_callback(copy_end)
