"""The device thread: collects jobs, asks the policy for plans, keeps two ticks in flight, hands images out.

Knows neither Celery nor JAX: the engine is anything with `execute(plan, jobs) -> tick`, `tick.wait() -> images` and
`reset()` (see `sdtpu_worker.testing.FakeEngine`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from sdtpu_worker.aggregator.plan import Aggregator, Lane, Outcome, Plan
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed

logger = logging.getLogger(__name__)

TICKS_IN_FLIGHT = 2


class Job(Protocol):
    """What the loop reads of a prepared job; the rest is between the host's preparation and the engine."""

    @property
    def task_id(self) -> str: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def num_inference_steps(self) -> int: ...


class ExecutedTick(Protocol):
    """A dispatched plan."""

    def wait(self) -> list[Any]:
        """Block until it is done; return objects with `task_id`, `device`, `slot`, `pixels`, `finite`."""


class DeviceEngine(Protocol):
    """The device contract: the engine never chooses."""

    def execute(self, plan: Plan, jobs: Mapping[str, Any]) -> ExecutedTick: ...
    def reset(self) -> None: ...


class JobCancelled(Exception):
    """The job was taken off its slot before it was done."""


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
    active_s: float = 0.0
    device_busy_s: list[float] = field(default_factory=list)
    occupied_slot_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the counters as a JSON-compatible dict."""
        return {**vars(self), "device_busy_s": list(self.device_busy_s)}


@dataclass
class _Entry:
    job: Job
    future: Future[Finished]
    started_at: float | None = None


class DeviceLoop:
    """Runs plans until it is closed. `submit`, `cancel` and `close` may be called from any thread.

    Args:
        engine: who executes the plans.
        aggregator: who makes them; owned by this loop's thread from now on.
        on_death: called when the loop cannot go on (the engine could not even be reset).
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        aggregator: Aggregator,
        on_death: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_death = on_death
        self._engine, self._aggregator, self._clock = engine, aggregator, clock
        self._wake = threading.Condition()
        self._arrivals: deque[_Entry] = deque()
        self._cancelled: deque[str] = deque()
        self._closing = False
        self._entries: dict[str, _Entry] = {}
        self._in_flight: deque[tuple[ExecutedTick, Plan, float]] = deque()
        self._last_done_at = self._active_since = clock()
        self.stats = LoopStats(device_busy_s=[0.0] * aggregator.num_devices)
        self._thread = threading.Thread(target=self._run, name="sdtpu-device-loop", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> Future[Finished]:
        """Queue a job.

        Returns:
            A future of `Finished`. It raises `GenerationFailed` when the device failed, `JobCancelled` after
            `cancel`, `EngineUnavailable` when the loop is closed.
        """
        entry = _Entry(job, Future())
        with self._wake:
            if self._closing:
                raise EngineUnavailable("the device loop is closed: the worker is stopping")
            self._arrivals.append(entry)
            self._wake.notify()
        return entry.future

    def cancel(self, task_id: str) -> None:
        """Take a job off the queue or its slot at the next tick; unknown ids are ignored."""
        with self._wake:
            self._cancelled.append(task_id)
            self._wake.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the thread; jobs that are still here fail with `EngineUnavailable`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._take_in():
                plan = self._aggregator.plan() if len(self._in_flight) < TICKS_IN_FLIGHT else None
                if plan:
                    self._dispatch(plan)
                if self._in_flight and (plan is None or len(self._in_flight) == TICKS_IN_FLIGHT):
                    self._complete()
        except BaseException as exc:
            logger.critical("the device loop died: %r", exc, exc_info=True)
            with self._wake:
                self._closing = True
            self._on_death()
        finally:
            for entry in [*self._entries.values(), *self._arrivals]:
                _fail(entry, EngineUnavailable("the worker stopped before this job was done"))

    def _take_in(self) -> bool:
        """Wait for something to do and hand arrivals and cancellations to the policy; False when closing."""
        with self._wake:
            while not (self._arrivals or self._cancelled or self._entries or self._in_flight or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            arrivals, cancelled = list(self._arrivals), list(self._cancelled)
            self._arrivals.clear()
            self._cancelled.clear()
        if arrivals and not self._entries:
            self._active_since = self._clock()
        for entry in arrivals:
            job = entry.job
            if job.task_id in self._entries:  # a redelivery of what is running here: it gets the same result
                self._entries[job.task_id].future.add_done_callback(partial(_copy_end, entry.future))
                continue
            try:
                self._aggregator.add(job.task_id, job.lane, job.num_inference_steps)
            except (KeyError, ValueError) as exc:
                _fail(entry, GenerationFailed(f"task {job.task_id} was not taken in: {exc}"))
                continue
            self._entries[job.task_id] = entry
        for task_id in cancelled:
            self._aggregator.cancel(task_id)
            if task_id in self._entries:
                self._leave(task_id, JobCancelled(task_id))
        return True

    def _dispatch(self, plan: Plan) -> None:
        now = self._clock()
        jobs = {}
        for device in plan.devices:
            if device.insert:
                entry = self._entries[device.insert[1]]
                entry.started_at = now
                jobs[entry.job.task_id] = entry.job
        try:
            self._in_flight.append((self._engine.execute(plan, jobs), plan, now))
        except Exception as exc:
            self._recover(exc)

    def _complete(self) -> None:
        """Wait for the oldest tick; deliver its images."""
        tick, plan, dispatched_at = self._in_flight.popleft()
        try:
            images = tick.wait()
        except Exception as exc:
            self._recover(exc)
            return
        now = self._clock()
        elapsed_s = now - max(dispatched_at, self._last_done_at)
        self._last_done_at = now
        self._aggregator.update(Outcome(plan, elapsed_s))
        self._count(plan, elapsed_s)
        for image in images:
            entry = self._entries.get(image.task_id)
            if entry is None or entry.started_at is None:
                continue  # cancelled while its last tick was in flight
            if not image.finite:
                self._leave(
                    image.task_id,
                    GenerationFailed(
                        f"the model gave NaN or infinite values for this request on device {image.device}"
                    ),
                )
                continue
            self.stats.images += 1
            finished = Finished(image.pixels, image.device, image.slot, plan.occupied, entry.started_at, now)
            self._leave(image.task_id, finished)
        if not self._entries:
            self.stats.active_s += now - self._active_since

    def _recover(self, exc: Exception) -> None:
        """A device program failed: jobs that have a slot fail with the cause, the others go on with fresh slots."""
        logger.error("a device program failed: %r", exc, exc_info=True)
        self._in_flight.clear()
        for task_id, entry in list(self._entries.items()):
            if entry.started_at is not None:
                self._aggregator.cancel(task_id)
                self._leave(task_id, GenerationFailed(f"the device program failed: {type(exc).__name__}: {exc}"))
        self._engine.reset()

    def _leave(self, task_id: str, end: Finished | Exception) -> None:
        entry = self._entries.pop(task_id)
        if isinstance(end, Exception):
            _fail(entry, end)
        else:
            entry.future.set_result(end)

    def _count(self, plan: Plan, elapsed_s: float) -> None:
        self.stats.ticks += 1
        self.stats.occupied_slot_s += plan.occupied * elapsed_s
        for i, device in enumerate(plan.devices):
            if not device.idle:
                self.stats.device_busy_s[i] += elapsed_s
        logger.debug(
            "tick of %.0f ms: %d slots in use, steps %s",
            1000 * elapsed_s, plan.occupied, [device.steps for device in plan.devices],
        )  # fmt: skip


def _copy_end(to: Future[Finished], done: Future[Finished]) -> None:
    exc = done.exception()
    if exc is None:
        to.set_result(done.result())
    else:
        to.set_exception(exc)


def _fail(entry: _Entry, exc: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(exc)
