"""The ticks that the devices are at, oldest first, and the thread that waits for them to end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.device_loop.protocols import ExecutedTick
from sdtpu_worker.device_loop.submission import Submission
from sdtpu_worker.device_loop.trace import Trace

TICKS_IN_FLIGHT = 2
_LEAD_S, _LEAD_SHARE = 0.01, 0.1


def dispatch_lead_s(expected_s: float) -> float:
    """Return how long before the expected end of a tick of this length the next one is dispatched."""
    return _LEAD_S + _LEAD_SHARE * expected_s


@dataclass(eq=False)
class Flight:
    """A dispatched tick.

    Attributes:
        jobs: those in it, by task id; a job that is submitted again under the same id is another one.
        started_at: when the devices began, or will have.
    """

    tick: ExecutedTick
    plan: Plan
    jobs: Mapping[str, Submission]
    expected_s: float
    started_at: float

    @property
    def ends_at(self) -> float:
        """When the devices should be done."""
        return self.started_at + self.expected_s

    def steps_taken(self) -> int:
        """Take note of how far its jobs are now; return how many steps they took in it."""
        taken = 0
        for task_id, steps in self.plan.steps_done.items():
            if job := self.jobs.get(task_id):
                taken += steps - job.steps_done
                job.steps_done = steps
        return taken


class Flights:
    """The queue of them, owned by the loop's thread.

    Args:
        on_end: told of every tick that ended, with its images or what it raised, and when; in the waiting thread.
        trace: where the transfer of the images is drawn.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        on_end: Callable[[Flight, list[Any] | Exception, float], None],
        trace: Trace,
        clock: Callable[[], float],
    ) -> None:
        self._on_end, self._trace, self._clock = on_end, trace, clock
        self._flights: deque[Flight] = deque()
        self._to_wait_for: SimpleQueue[Flight | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._wait, name="sdtpu-device-wait", daemon=True)

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, flight: Flight) -> None:
        """Take in a tick that was dispatched."""
        self._flights.append(flight)
        self._to_wait_for.put(flight)

    def land(self, flight: Flight, at: float) -> None:
        """Take out the oldest, which has ended; the next one began then at the earliest."""
        assert self.is_oldest(flight)
        self._flights.popleft()
        if self._flights:
            self._flights[0].started_at = max(at, self._flights[0].started_at)

    def is_oldest(self, flight: Flight) -> bool:
        """Whether it is what the devices are at; ticks end in the order in which they were dispatched."""
        return self.oldest is flight

    def forget(self) -> None:
        """Drop all: a failure took them; their ends mean nothing any more."""
        self._flights.clear()

    def stop(self) -> None:
        """End the thread as soon as nothing is in flight."""
        self._to_wait_for.put(None)

    def ends_at(self, now: float) -> float:
        """Return when the devices should have done all of it."""
        end = now
        for i, flight in enumerate(self._flights):
            end = end + flight.expected_s if i else max(now, flight.ends_at)
        return end

    @property
    def oldest(self) -> Flight | None:
        """What the devices are at. Any thread."""
        try:
            return self._flights[0]
        except IndexError:
            return None

    def late_s(self, now: float) -> float:
        """Return by how much the oldest is late. Any thread."""
        oldest = self.oldest
        return max(0.0, now - oldest.ends_at) if oldest else 0.0

    def parking(self) -> set[str]:
        """Return the jobs whose state is on its way from the devices. Any thread."""
        return {place.task_id for flight in list(self._flights) for place in flight.plan.parked}

    def _wait(self) -> None:
        """Wait for the devices, so that the loop's thread can take jobs in meanwhile."""
        while (flight := self._to_wait_for.get()) is not None:
            try:
                end: list[Any] | Exception = flight.tick.wait()
            except Exception as exc:
                end = exc
            now = self._clock()
            done_at = flight.tick.done_at or now
            self._trace.transfer(flight.plan, done_at, now)
            self._on_end(flight, end, done_at)
