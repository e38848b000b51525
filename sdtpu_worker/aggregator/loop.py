"""The device thread: collects jobs, asks the policy for plans, keeps the devices busy, hands images out.

Knows neither Celery nor JAX: the engine is anything with `execute(plan, jobs, snapshots) -> tick`, `tick.wait() ->
images` and `reset()` (see `sdtpu_worker.testing.FakeEngine`).

Two ticks are in flight at most. The second is dispatched shortly before the first is expected to end: early enough
that the devices never wait, late enough that a job which comes now is in it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.plan import Outcome, Plan
from sdtpu_worker.aggregator.protocols import DeviceEngine, ExecutedTick, Job, Policy
from sdtpu_worker.aggregator.trace import NoTrace, Trace
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed

logger = logging.getLogger(__name__)

TICKS_IN_FLIGHT = 2
_LEAD_S, _LEAD_SHARE = 0.01, 0.1
_ETA_EVERY_S = 0.2


def dispatch_lead_s(expected_s: float) -> float:
    """Return how long before the expected end of a tick of this length the next one is dispatched."""
    return _LEAD_S + _LEAD_SHARE * expected_s


class JobCancelled(Exception):
    """The job was taken off its slot before it was done, or was not wanted any more when it should have had one."""


class JobOverdue(Exception):
    """The job's time was over; `reason` says which time."""

    def __init__(self, reason: Overdue) -> None:
        super().__init__(reason.value)
        self.reason = reason


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


@dataclass
class LoopStats:
    """Counters since the start; `active_s` counts the time with at least one job here."""

    ticks: int = 0
    images: int = 0
    steps: int = 0
    preemptions: int = 0
    active_s: float = 0.0
    device_busy_s: list[float] = field(default_factory=list)
    occupied_slot_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the counters as a JSON-compatible dict."""
        return {**vars(self), "device_busy_s": list(self.device_busy_s)}


@dataclass
class Submission:
    """A job in the loop's hands: `future` of `Finished`, and how far it is.

    `moved` is set when it gets a slot, loses it or ends; whoever waits for that clears it.
    """

    job: Job
    terms: Terms
    may_start: Callable[[], bool]
    snapshot: Any
    progress: Progress
    future: Future[Finished] = field(default_factory=Future)
    moved: threading.Event = field(default_factory=threading.Event)
    started_at: float | None = None
    parked: bool = False


@dataclass
class _InFlight:
    tick: ExecutedTick
    plan: Plan
    expected_s: float
    started_at: float  # when the devices began, or will have


class DeviceLoop:
    """Runs plans until it is closed. `submit`, `cancel` and `close` may be called from any thread.

    Args:
        engine: who executes the plans.
        policy: who makes them; owned by this loop's thread from now on.
        on_death: called when the loop cannot go on (the engine could not even be reset).
        trace: where the timeline of the run goes.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        policy: Policy,
        on_death: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._policy, self._clock = engine, policy, clock
        self._on_death, self._trace = on_death, trace or NoTrace()
        self._wake = threading.Condition()
        self._arrivals: deque[Submission] = deque()
        self._cancelled: deque[str] = deque()
        self._completed: deque[tuple[_InFlight, list[Any] | Exception, float]] = deque()
        self._closing = False
        self._nothing_to_plan = False
        self._here: dict[str, Submission] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._to_wait_for: SimpleQueue[_InFlight | None] = SimpleQueue()
        self._counted_until = self._etas_at = clock()
        self.lowest_priority_running: int | None = None
        self.stats = LoopStats(device_busy_s=[0.0] * policy.num_devices)
        self._thread = threading.Thread(target=self._run, name="sdtpu-device-loop", daemon=True)
        self._waiter = threading.Thread(target=self._wait_for_ticks, name="sdtpu-device-wait", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._waiter.start()
        self._thread.start()

    def submit(
        self,
        job: Job,
        terms: Terms | None = None,
        may_start: Callable[[], bool] = lambda: True,
        snapshot: Any = None,
    ) -> Submission:
        """Queue a job.

        Args:
            job: prepared by the engine.
            terms: priority, deadline and limits, in this loop's time.
            may_start: asked again and again, in the loop's thread, until the job has its slot.
            snapshot: the state to go on from, with its `step`; None to start. One of another configuration is
                dropped, and the job starts anew.

        Returns:
            With a future of `Finished`. It raises `GenerationFailed` when the device failed, `JobCancelled` after
            `cancel` or a no of `may_start`, `JobOverdue`, `EngineUnavailable` when the loop is closed.
        """
        if snapshot is not None and not self._engine.accepts(snapshot):
            logger.warning("task %s starts anew: its state was made by another configuration", job.task_id)
            snapshot = None
        progress = Progress(snapshot.step if snapshot else 0, job.num_inference_steps, True, "waiting for a slot")
        submission = Submission(job, terms or Terms(), may_start, snapshot, progress)
        submission.future.add_done_callback(lambda _: submission.moved.set())
        with self._wake:
            if self._closing:
                raise EngineUnavailable("the device loop is closed: the worker is stopping")
            self._arrivals.append(submission)
            self._wake.notify()
        return submission

    def cancel(self, task_id: str) -> None:
        """Take a job off the queue or its slot at the next tick; unknown ids are ignored."""
        with self._wake:
            self._cancelled.append(task_id)
            self._wake.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the threads; jobs that are still here fail with `EngineUnavailable`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        for thread in (self._thread, self._waiter):
            if thread.is_alive():
                thread.join(timeout_s)
        self._trace.close()

    def _run(self) -> None:
        try:
            while self._take_in():
                if self._is_due(self._clock()):
                    self._dispatch()
        except BaseException as exc:
            logger.critical("the device loop died: %r", exc, exc_info=True)
            with self._wake:
                self._closing = True
            self._on_death()
        finally:
            self._to_wait_for.put(None)
            for submission in [*self._here.values(), *self._arrivals]:
                _fail(submission, EngineUnavailable("the worker stopped before this job was done"))

    def _wait_for_ticks(self) -> None:
        """The second thread: waits for the devices, so that the first can take jobs in meanwhile."""
        while (item := self._to_wait_for.get()) is not None:
            try:
                end: list[Any] | Exception = item.tick.wait()
            except Exception as exc:
                end = exc
            now = self._clock()
            done_at = item.tick.done_at or now
            self._trace.transfer(item.plan, done_at, now)
            with self._wake:
                self._completed.append((item, end, done_at))
                self._wake.notify()

    def _take_in(self) -> bool:
        """Wait for something to do and take in what came; False when closing."""
        with self._wake:
            while not (self._arrivals or self._cancelled or self._completed or self._closing):
                wait_s = self._seconds_until_due(self._clock())
                if wait_s is not None and wait_s <= 0:
                    break
                self._wake.wait(wait_s)
            if self._closing:
                return False
            arrivals, cancelled, completed = list(self._arrivals), list(self._cancelled), list(self._completed)
            for queue in (self._arrivals, self._cancelled, self._completed):
                queue.clear()
        now = self._clock()
        if self._here:
            self.stats.active_s += now - self._counted_until
        self._counted_until = now
        for item, end, at in completed:
            self._complete(item, end, at)
        if arrivals or cancelled or completed:
            self._nothing_to_plan = False
        for submission in arrivals:
            self._admit(submission)
        for task_id in cancelled:
            self._policy.cancel(task_id)
            if task_id in self._here:
                self._leave(task_id, JobCancelled(task_id))
        return True

    def _admit(self, submission: Submission) -> None:
        job = submission.job
        if job.task_id in self._here:  # a redelivery of what is running here: it gets the same result
            self._here[job.task_id].future.add_done_callback(partial(_copy_end, submission.future))
            return
        try:
            self._queue(submission)
        except (KeyError, ValueError) as exc:
            _fail(submission, GenerationFailed(f"task {job.task_id} was not taken in: {exc}"))
            return
        self._here[job.task_id] = submission

    def _queue(self, submission: Submission) -> None:
        """Give a job to the policy, to start or to go on from its state."""
        job, snapshot = submission.job, submission.snapshot
        steps_done = snapshot.step if snapshot else 0
        self._policy.add(job.task_id, job.lane, job.num_inference_steps, self._clock(), submission.terms, steps_done)

    def _seconds_until_due(self, now: float) -> float | None:
        """Return how long to wait before the next dispatch; None while there is nothing to dispatch."""
        if self._nothing_to_plan or not self._here or len(self._in_flight) >= TICKS_IN_FLIGHT:
            return None
        if not self._in_flight:
            return 0.0
        running = self._in_flight[0]
        return running.started_at + running.expected_s - dispatch_lead_s(running.expected_s) - now

    def _is_due(self, now: float) -> bool:
        wait_s = self._seconds_until_due(now)
        return wait_s is not None and wait_s <= 0

    def _dispatch(self) -> None:
        now = self._clock()
        for task_id, reason in self._policy.overdue(now):
            self._leave(task_id, JobOverdue(reason))
        for task_id, submission in list(self._here.items()):
            if submission.started_at is None and not submission.may_start():
                self._policy.cancel(task_id)
                self._leave(task_id, JobCancelled(task_id))
        plan = self._policy.plan(now)
        self.lowest_priority_running = self._policy.lowest_priority_running()
        if plan is None:
            self._nothing_to_plan = True
            return
        for task_id in [*plan.inserted(), *(place.task_id for place in plan.resumed)]:
            if self._here[task_id].started_at is None:
                self._here[task_id].started_at = now
        jobs = {task_id: self._here[task_id].job for task_id in plan.inserted()}
        snapshots = {place.task_id: self._here[place.task_id].snapshot for place in plan.resumed}
        try:
            tick = self._engine.execute(plan, jobs, snapshots)
        except Exception as exc:
            self._recover(exc)
            return
        for place in plan.resumed:
            self._here[place.task_id].parked = False
        for task_id, snapshot in tick.parked.items():
            self._here[task_id].parked, self._here[task_id].snapshot = True, snapshot
        item = _InFlight(tick, plan, self._policy.expected_s(plan), self._clock())
        self._in_flight.append(item)
        self._to_wait_for.put(item)

    def _complete(self, item: _InFlight, end: list[Any] | Exception, now: float) -> None:
        """Deliver what a tick made; ticks end in the order in which they were dispatched."""
        if not self._in_flight or self._in_flight[0] is not item:
            return  # dispatched before a failure that emptied the slots
        if isinstance(end, Exception):
            self._recover(end)
            return
        self._in_flight.popleft()
        if self._in_flight:
            self._in_flight[0].started_at = max(now, self._in_flight[0].started_at)
        plan, elapsed_s = item.plan, now - item.started_at
        self._policy.update(Outcome(plan, elapsed_s))
        self._count(plan, elapsed_s)
        self._trace.tick(plan, item.started_at, now)
        for image in end:
            submission = self._here.get(image.task_id)
            if submission is None or submission.started_at is None:
                continue  # cancelled while its last tick was in flight
            if not image.finite:
                reason = f"the model gave NaN or infinite values for this request on device {image.device}"
                self._leave(image.task_id, GenerationFailed(reason))
                continue
            self.stats.images += 1
            finished = Finished(image.pixels, image.device, image.slot, plan.occupied, submission.started_at, now)
            self._leave(image.task_id, finished)
        self._report_progress(plan, item.tick.previews, now)

    def _report_progress(self, plan: Plan, previews: Mapping[str, Any], now: float) -> None:
        """Let everybody know how far they are, from what was planned; nothing is read from the devices for it."""
        for task_id, steps in plan.steps_done.items():
            if submission := self._here.get(task_id):
                old = submission.progress
                submission.progress = replace(
                    old,
                    current=max(steps, old.current),
                    pending=submission.parked,
                    description="waiting for a slot again" if submission.parked else "denoising",
                    preview=previews.get(task_id, old.preview),
                )
                if submission.progress.pending != old.pending:
                    submission.moved.set()
        is_new = any(submission.progress.eta_s is None for submission in self._here.values())
        if is_new or now - self._etas_at >= _ETA_EVERY_S:
            self._etas_at = now
            for task_id, eta_s in self._policy.etas_s(now).items():
                if submission := self._here.get(task_id):
                    submission.progress = replace(submission.progress, eta_s=eta_s)

    def _recover(self, exc: Exception) -> None:
        """A device program failed: jobs that have a slot fail with the cause, the others go on with fresh slots.

        Parked ones are among the others: their state is on the host.
        """
        logger.error("a device program failed: %r", exc, exc_info=True)
        self._in_flight.clear()
        for task_id, submission in list(self._here.items()):
            if submission.started_at is not None:
                self._policy.cancel(task_id)
                if submission.parked:
                    with contextlib.suppress(Exception):  # unless the failure took its state too
                        self._queue(submission)
                        continue
                self._leave(task_id, GenerationFailed(f"the device program failed: {type(exc).__name__}: {exc}"))
        self._engine.reset()

    def _leave(self, task_id: str, end: Finished | Exception) -> None:
        submission = self._here.pop(task_id)
        if isinstance(end, Exception):
            _fail(submission, end)
        else:
            submission.future.set_result(end)

    def _count(self, plan: Plan, elapsed_s: float) -> None:
        stats, longest = self.stats, max(plan.work_s, default=0.0)
        stats.ticks += 1
        stats.preemptions += len(plan.parked)
        stats.steps += sum(phase.steps for phases in plan.devices for phase in phases)
        stats.occupied_slot_s += plan.occupied * elapsed_s
        for i, work_s in enumerate(plan.work_s):
            stats.device_busy_s[i] += elapsed_s * work_s / max(longest, 1e-9)
        logger.debug(
            "tick of %.0f ms: %d slots in use, steps %s", 1000 * elapsed_s, plan.occupied,
            [sum(phase.steps for phase in phases) for phases in plan.devices],
        )  # fmt: skip


def _copy_end(to: Future[Finished], done: Future[Finished]) -> None:
    exc = done.exception()
    if exc is None:
        to.set_result(done.result())
    else:
        to.set_exception(exc)


def _fail(submission: Submission, exc: Exception) -> None:
    if not submission.future.done():
        submission.future.set_exception(exc)
