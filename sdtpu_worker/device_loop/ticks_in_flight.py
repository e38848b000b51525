"""The ticks that were dispatched to the engine and have not ended, and the thread that waits for them to end."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.device_loop.protocols import DeviceEngine, ExecutedTick, Image, Job, Snapshot
from sdtpu_worker.device_loop.submission import Submission
from sdtpu_worker.device_loop.trace import Trace

MAX_TICKS_IN_FLIGHT = 2
_LEAD_S, _LEAD_SHARE = 0.01, 0.1


def dispatch_lead_s(expected_s: float) -> float:
    """Return how long before the expected end of a tick of this length the next tick is dispatched.

    That is early enough that the devices never wait, and late enough that a job which comes in the meantime is in it.
    """
    return _LEAD_S + _LEAD_SHARE * expected_s


@dataclass(eq=False)
class TickInFlight:
    """A dispatched tick.

    Attributes:
        executed: the engine's side of it.
        jobs: the jobs in it, by task id; a job that is submitted again under the same id is another one.
        started_at: when the devices began, or are expected to begin.
    """

    executed: ExecutedTick
    plan: Plan
    jobs: Mapping[str, Submission]
    expected_s: float
    started_at: float

    @property
    def ends_at(self) -> float:
        """When the devices should be done."""
        return self.started_at + self.expected_s

    def count_steps(self) -> int:
        """Set how many steps its jobs have taken now; return how many of them they took in this tick."""
        taken = 0
        for task_id, steps in self.plan.steps_done.items():
            if job := self.jobs.get(task_id):
                taken += steps - job.steps_done
                job.steps_done = steps
        return taken


class TicksInFlight:
    """Dispatches plans to the engine and keeps the ticks in flight, oldest first; owned by the loop's thread.

    Args:
        engine: executes the plans.
        on_end: told of every tick that ended, with its images or what it raised, and when; in the waiting thread.
        trace: where the transfer of the images is drawn.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        on_end: Callable[[TickInFlight, Sequence[Image] | Exception, float], None],
        trace: Trace,
        clock: Callable[[], float],
    ) -> None:
        self._engine, self._on_end, self._trace, self._clock = engine, on_end, trace, clock
        self._answer_due_at: float | None = None  # when the engine's call that is under way should return
        self._ticks: deque[TickInFlight] = deque()
        self._to_wait_for: SimpleQueue[TickInFlight | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._wait, name="sdtpu-device-wait", daemon=True)

    def __len__(self) -> int:
        return len(self._ticks)

    def dispatch(
        self,
        plan: Plan,
        jobs: Mapping[str, Job],
        snapshots: Mapping[str, Snapshot | None],
        submissions: Mapping[str, Submission],
        expected_s: float,
    ) -> TickInFlight:
        """Have the engine execute a plan, and add its tick.

        Args:
            plan: what the devices do.
            jobs: by task id, the prepared jobs that the plan inserts.
            snapshots: by task id, the snapshots of the jobs that the plan resumes.
            submissions: by task id, the jobs that take steps in the tick or are decoded in it.
            expected_s: seconds that the policy expects the tick to take.

        Raises:
            Exception: what the engine raised.
        """
        with self._answer_due(self.ends_at(self._clock()) + expected_s):
            executed = self._engine.execute(plan, jobs, snapshots)
        tick = TickInFlight(executed, plan, submissions, expected_s, self._clock())
        self._ticks.append(tick)
        self._to_wait_for.put(tick)
        return tick

    def recover(self, lost: Collection[int]) -> Collection[int]:
        """Have the engine prove which devices work after a failure, and remove all ticks.

        Args:
            lost: devices that are lost already.

        Returns:
            The devices that do not work.

        Raises:
            Exception: no device works.
        """
        with self._answer_due(self._clock()):
            found = self._engine.recover(lost)
        self.forget()
        return found

    def check_devices(self, lost: Collection[int]) -> Collection[int]:
        """Have the engine prove which devices work, while no tick is in flight; otherwise as `recover`."""
        with self._answer_due(self._clock()):
            return self._engine.check_devices(lost)

    def remove(self, tick: TickInFlight, at: float) -> None:
        """Remove the oldest tick, which has ended; the devices began the next one then at the earliest."""
        assert self.is_oldest(tick)
        self._ticks.popleft()
        if self._ticks:
            self._ticks[0].started_at = max(at, self._ticks[0].started_at)

    def is_oldest(self, tick: TickInFlight) -> bool:
        """Return whether the devices work on this tick; ticks end in the order in which they were dispatched."""
        return self.oldest is tick

    def forget(self) -> None:
        """Remove all ticks after a failure that emptied the slots; how they end does not matter any more."""
        self._ticks.clear()

    def stop(self) -> None:
        """End the waiting thread as soon as the ticks in flight have ended."""
        self._to_wait_for.put(None)

    def seconds_until_next(self, now: float) -> float | None:
        """Return how long to wait before the next dispatch; None while as many ticks are in flight as may be."""
        if len(self._ticks) >= MAX_TICKS_IN_FLIGHT:
            return None
        oldest = self.oldest
        return 0.0 if oldest is None else oldest.ends_at - dispatch_lead_s(oldest.expected_s) - now

    def ends_at(self, now: float) -> float:
        """Return when the devices should be done with all ticks."""
        end = now
        for i, tick in enumerate(self._ticks):
            end = end + tick.expected_s if i else max(now, tick.ends_at)
        return end

    @property
    def oldest(self) -> TickInFlight | None:
        """The tick that the devices work on. Any thread."""
        try:
            return self._ticks[0]
        except IndexError:
            return None

    def late_s(self, now: float) -> float:
        """Return by how many seconds the oldest tick, or an answer of the engine, is late; 0.0 if none. Any thread."""
        oldest, answer_due_at = self.oldest, self._answer_due_at
        due = [at for at in (oldest.ends_at if oldest else None, answer_due_at) if at is not None]
        return max([0.0, *(now - at for at in due)])

    def parking(self) -> set[str]:
        """Return the jobs whose snapshots are on their way from the devices. Any thread."""
        return {place.task_id for tick in list(self._ticks) for place in tick.plan.parked}

    @contextlib.contextmanager
    def _answer_due(self, at: float) -> Iterator[None]:
        """Expect the engine's call in this block to return by a time."""
        self._answer_due_at = at
        try:
            yield
        finally:
            self._answer_due_at = None

    def _wait(self) -> None:
        """Wait for the devices, so that the loop's thread can accept jobs meanwhile."""
        while (tick := self._to_wait_for.get()) is not None:
            self._wait_for(tick)

    def _wait_for(self, tick: TickInFlight) -> None:
        """Wait for the end of one tick, and tell of it."""
        try:
            end: Sequence[Image] | Exception = tick.executed.wait()
        except Exception as exc:
            end = exc
        now = self._clock()
        done_at = tick.executed.done_at or now
        self._trace.transfer(tick.plan, done_at, now)
        self._on_end(tick, end, done_at)
