"""What other threads tell the device loop, and how the loop's thread sleeps until one of them does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sdtpu_worker.device_loop.protocols import Image
from sdtpu_worker.device_loop.submission import Submission
from sdtpu_worker.device_loop.ticks_in_flight import TickInFlight

TickEnd = tuple[TickInFlight, Sequence[Image] | Exception, float]
"""A tick that has ended, its images or what it raised, and the time when its devices were done."""


@dataclass
class Mail:
    """What came since the loop's thread last emptied its inbox.

    Attributes:
        has_new_deadline: `drain` set the deadline, or brought it forward.
    """

    arrivals: list[Submission] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: list[TickEnd] = field(default_factory=list)
    has_new_deadline: bool = False

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.cancelled or self.ended or self.has_new_deadline)


class Inbox:
    """Emptied by the loop's thread, filled by any.

    `lock` is held for moments only, and the thread that holds it may take it again: a signal handler that drains the
    loop may have interrupted its own thread in here.

    Attributes:
        drain_at: the time by which every job has to be off the devices; None while there is no such deadline.
        is_closed: the inbox refuses new jobs, and the loop's thread ends.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()  # of an RLock
        self.drain_at: float | None = None
        self.is_closed = False
        self._known_drain_at: float | None = None
        self._arrivals: deque[Submission] = deque()
        self._cancelled: deque[str] = deque()
        self._ended: deque[TickEnd] = deque()

    def submit(self, submission: Submission) -> bool:
        """Post a job; return False if the inbox is closed."""
        with self.lock:
            if self.is_closed:
                return False
            self._arrivals.append(submission)
            self.lock.notify_all()
            return True

    def cancel(self, task_id: str) -> None:
        """Post that a job is not wanted any more."""
        with self.lock:
            self._cancelled.append(task_id)
            self.lock.notify_all()

    def end(self, tick: TickInFlight, end: Sequence[Image] | Exception, at: float) -> None:
        """Post that a tick has ended."""
        with self.lock:
            self._ended.append((tick, end, at))
            self.lock.notify_all()

    def drain(self, at: float) -> None:
        """Set the time by which every job has to be off the devices; a later time than before changes nothing."""
        self.drain_at = at if self.drain_at is None else min(at, self.drain_at)
        with self.lock:
            self.lock.notify_all()

    def close(self) -> list[Submission]:
        """Refuse new jobs from now on; return the jobs that the loop's thread has not accepted."""
        with self.lock:
            self.is_closed = True
            left = list(self._arrivals)
            self._arrivals.clear()
            self.lock.notify_all()
            return left

    def take(self, wait_s: Callable[[], float | None], accept: Callable[[Submission], None]) -> Mail | None:
        """Sleep until something came, and return it; None when the inbox is closed.

        Args:
            wait_s: returns for how long to sleep at most; None for ever.
            accept: accepts a new job while the inbox is locked, so that every job is either in the inbox or accepted
                at any time.
        """
        with self.lock:
            while not (self.is_closed or self._arrivals or self._cancelled or self._ended or self._has_new_deadline()):
                seconds = wait_s()
                if seconds is not None and seconds <= 0:
                    break
                self.lock.wait(seconds)
            if self.is_closed:
                return None
            mail = Mail(list(self._arrivals), list(self._cancelled), list(self._ended), self._has_new_deadline())
            self._known_drain_at = self.drain_at
            for submission in mail.arrivals:
                accept(submission)
            for queue in (self._arrivals, self._cancelled, self._ended):
                queue.clear()
            return mail

    def wait_until_overdue(self, patience_s: float, clock: Callable[[], float]) -> bool:
        """Sleep until `patience_s` after `drain_at`; return False when the inbox was closed before."""
        with self.lock:
            while not self.is_closed:
                left_s = None if self.drain_at is None else self.drain_at + patience_s - clock()
                if left_s is not None and left_s <= 0:
                    return True
                self.lock.wait(left_s)
            return False

    def _has_new_deadline(self) -> bool:
        return self.drain_at != self._known_drain_at
