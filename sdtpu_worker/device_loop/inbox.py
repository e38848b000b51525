"""What other threads tell the device loop, and how its thread sleeps until there is something."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.device_loop.submission import Submission
from sdtpu_worker.device_loop.ticks_in_flight import Flight

FlightEnd = tuple[Flight, list[Any] | Exception, float]


@dataclass
class Mail:
    """What came since it was last taken in."""

    arrivals: list[Submission] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: list[FlightEnd] = field(default_factory=list)
    drains_anew: bool = False

    def __bool__(self) -> bool:
        return bool(self.arrivals or self.cancelled or self.ended or self.drains_anew)


class Inbox:
    """Taken from by the loop's thread, filled from any.

    `lock` is held for moments only and may be taken again by the thread that has it: a signal handler that drains may
    have interrupted its own thread in here.

    Attributes:
        drain_at: when every job has to be off the devices; None while the loop goes on for good.
        is_closed: nobody takes in anything any more.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()  # of an RLock
        self.drain_at: float | None = None
        self.is_closed = False
        self._drain_at_taken: float | None = None
        self._arrivals: deque[Submission] = deque()
        self._cancelled: deque[str] = deque()
        self._ended: deque[FlightEnd] = deque()

    def submit(self, submission: Submission) -> bool:
        """Post a job; False if the loop is closed."""
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

    def end(self, flight: Flight, end: list[Any] | Exception, at: float) -> None:
        """Post what came of a tick."""
        with self.lock:
            self._ended.append((flight, end, at))
            self.lock.notify_all()

    def drain(self, at: float) -> None:
        """Set the time when every job has to be off the devices; it is never put off."""
        self.drain_at = at if self.drain_at is None else min(at, self.drain_at)
        with self.lock:
            self.lock.notify_all()

    def close(self) -> list[Submission]:
        """Refuse everything from now on; return the jobs that nobody took in."""
        with self.lock:
            self.is_closed = True
            left = list(self._arrivals)
            self._arrivals.clear()
            self.lock.notify_all()
            return left

    def take(self, wait_s: Callable[[], float | None], admit: Callable[[Submission], None]) -> Mail | None:
        """Sleep until something came, and take it in; None when closed.

        Args:
            wait_s: for how long to sleep at most; None for ever.
            admit: takes in a new job, so that at any time every job is either here or there.
        """
        with self.lock:
            while not (self.is_closed or self._arrivals or self._cancelled or self._ended or self._drains_anew()):
                seconds = wait_s()
                if seconds is not None and seconds <= 0:
                    break
                self.lock.wait(seconds)
            if self.is_closed:
                return None
            mail = Mail(list(self._arrivals), list(self._cancelled), list(self._ended), self._drains_anew())
            self._drain_at_taken = self.drain_at
            for submission in mail.arrivals:
                admit(submission)
            for queue in (self._arrivals, self._cancelled, self._ended):
                queue.clear()
            return mail

    def wait_until_overdue(self, patience_s: float, clock: Callable[[], float]) -> bool:
        """Sleep until this long after `drain_at`; False when closed before."""
        with self.lock:
            while not self.is_closed:
                left_s = None if self.drain_at is None else self.drain_at + patience_s - clock()
                if left_s is not None and left_s <= 0:
                    return True
                self.lock.wait(left_s)
            return False

    def _drains_anew(self) -> bool:
        return self.drain_at != self._drain_at_taken
