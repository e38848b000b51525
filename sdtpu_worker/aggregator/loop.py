"""The device thread: collects jobs, asks the policy for plans, keeps the devices busy, hands images out.

Knows neither Celery nor JAX: the engine is anything with `execute(plan, jobs, snapshots) -> tick`, `tick.wait() ->
images` and `recover()` (see `sdtpu_worker.testing.FakeEngine`).

Two ticks are in flight at most. The second is dispatched shortly before the first is expected to end: early enough
that the devices never wait, late enough that a job which comes now is in it.

A program that fails costs nobody but the job that is at fault: all that had a slot are tried again, apart from the
others and from each other (`quarantine`). Devices that are lost, and a worker that stops (`drain`), cost no job
anything: another worker goes on with it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdtpu_worker.aggregator.flights import TICKS_IN_FLIGHT, Flight, Flights, dispatch_lead_s
from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.plan import Outcome, Place, Plan
from sdtpu_worker.aggregator.protocols import DeviceEngine, Job, Policy
from sdtpu_worker.aggregator.quarantine import Quarantine
from sdtpu_worker.aggregator.stats import LoopStats
from sdtpu_worker.aggregator.submission import (
    Finished,
    JobCancelled,
    JobHandedOver,
    JobOverdue,
    Progress,
    Submission,
)
from sdtpu_worker.aggregator.trace import NoTrace, Trace
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed

logger = logging.getLogger(__name__)

_ETA_EVERY_S = 0.2
_PATIENCE_S = 5.0
_MOST_CHARACTERS = 1000  # XLA's errors can bring pages of source locations


class DeviceLoop:
    """Runs plans until it is closed. `submit`, `cancel`, `drain`, `close` and the properties: from any thread.

    Args:
        engine: who executes the plans.
        policy: who makes them; owned by this loop's thread from now on.
        on_death: called when the loop cannot go on (the devices are lost), after its jobs were handed over.
        trace: where the timeline of the run goes.
        clock: monotonic seconds.
        on_start: told which tasks are about to get their first slot here, and whether all other jobs here have left
            the devices for good or for a while, in the loop's thread.
        patience_s: how long after the deadline of `drain` devices are waited for that do not answer.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        policy: Policy,
        on_death: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[Sequence[str], bool], None] = lambda task_ids, alone: None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._engine, self._policy, self._clock = engine, policy, clock
        self._on_death, self._on_start, self._trace = on_death, on_start, trace or NoTrace()
        self._wake, self._drain_asked = threading.Condition(), threading.Condition()  # of RLocks: see `drain`
        self._arrivals: deque[Submission] = deque()
        self._cancelled: deque[str] = deque()
        self._completed: deque[tuple[Flight, list[Any] | Exception, float]] = deque()
        self._closing = self._is_logged = False
        self._nothing_to_plan = False
        self._here: dict[str, Submission] = {}
        self._quarantine = Quarantine()
        self._admitted: frozenset[str] | None = None
        self._failure: Exception | None = None  # of a dispatch; taken care of when what is in flight has ended
        self._answer_due_at: float | None = None  # when a call of the engine should be back that is under way
        self._drain_at: float | None = None
        self._drain_at_seen: float | None = None
        self._parking = self._given_up = False
        self._patience_s = patience_s
        self._flights = Flights(self._on_end, self._trace, clock)
        self._counted_until = self._etas_at = clock()
        self.lowest_priority_running: int | None = None
        self.stats = LoopStats(device_busy_s=[0.0] * policy.num_devices)
        self._thread = threading.Thread(target=self._run, name="sdtpu-device-loop", daemon=True)
        self._watch = threading.Thread(target=self._give_up_in_time, name="sdtpu-device-watch", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        for thread in (self._flights.thread, self._watch, self._thread):
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs: started, neither closed nor dead."""
        stopped = self._closing or self._given_up
        return not stopped and self._thread.is_alive() and self._flights.thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """By how many seconds the devices are late with what they are at; 0.0 if they are not."""
        now, answer_due_at = self._clock(), self._answer_due_at
        return max(self._flights.late_s(now), now - answer_due_at if answer_due_at is not None else 0.0)

    def submit(
        self,
        job: Job,
        terms: Terms | None = None,
        may_start: Callable[[], bool] = lambda: True,
        snapshot: Any = None,
        alone: bool = False,
    ) -> Submission:
        """Queue a job.

        Args:
            job: prepared by the engine.
            terms: priority, deadline and limits, in this loop's time.
            may_start: asked again and again, in the loop's thread, until the job has its slot.
            snapshot: the state to go on from, with its `step`; None to start. One of another configuration is
                dropped, and the job starts anew.
            alone: no other job may be on the devices with it, and a failure is its own fault at once; for jobs that
                were there when workers died.

        Returns:
            With a future of `Finished`. It raises `GenerationFailed` when the device failed on this job,
            `JobCancelled` after `cancel` or a no of `may_start`, `JobOverdue`, `JobHandedOver` when the devices are
            lost or the worker drains, `EngineUnavailable` when the loop is closed.

        Raises:
            EngineUnavailable: it is closed already.
        """
        if snapshot is not None and not self._engine.accepts(snapshot):
            logger.warning("task %s starts anew: its state was made by another configuration", job.task_id)
            snapshot = None
        steps_done = snapshot.step if snapshot is not None else 0
        progress = Progress(steps_done, job.num_inference_steps, True, "waiting for a slot")
        submission = Submission(job, terms or Terms(), may_start, snapshot, progress, self._clock(), alone)
        submission.steps_done = steps_done
        submission.future.add_done_callback(lambda _: submission.moved.set())
        with self._wake:
            if self._given_up:
                self._hand_over(submission)
                return submission
            if self._closing:
                raise EngineUnavailable("the device loop is closed: the worker is stopping")
            submission.too_late = self._drain_at is not None
            self._arrivals.append(submission)
            self._wake.notify()
        return submission

    def cancel(self, task_id: str) -> None:
        """Take a job off the queue or its slot at the next tick; unknown ids are ignored."""
        with self._wake:
            self._cancelled.append(task_id)
            self._wake.notify()

    def drain(self, grace_s: float) -> None:
        """Finish what can be finished within this time and hand over the rest, with its state: `JobHandedOver`.

        Jobs that wait and cannot be done in time end at once, and so do new ones. At the deadline those that run are
        taken off their slots, after the ticks that are in flight. Afterwards there is nothing to do but `close`.
        May be called again to shorten the time, also by a signal handler: it never waits.

        Args:
            grace_s: from now; 0 to hand over at once.
        """
        drain_at = self._clock() + max(0.0, grace_s)
        self._drain_at = drain_at if self._drain_at is None else min(drain_at, self._drain_at)
        for condition in (self._wake, self._drain_asked):  # a handler may interrupt its own thread in here
            with condition:
                condition.notify_all()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the threads; jobs that are still here fail with `EngineUnavailable`, or are handed over if it drains."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        with self._drain_asked:
            self._drain_asked.notify_all()
        deadline = time.monotonic() + (0.1 if self._given_up else timeout_s)
        for thread in (self._thread, self._flights.thread, self._watch):
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._given_up |= self._thread.is_alive()
        self._end_all()
        self._trace.close()
        if not self._is_logged:
            self._is_logged = True
            logger.info("the device loop is closed: %s", json.dumps(self.stats.to_json()))

    def _run(self) -> None:
        try:
            while self._take_in():
                now = self._clock()
                if self._failure is not None:
                    if not self._flights:
                        self._recover(self._failure)
                elif self._drain_at is not None and now >= self._drain_at:
                    self._park_all()
                elif self._is_due(now):
                    self._dispatch(now)
        except BaseException as exc:
            if not self._given_up:
                logger.critical("the device loop died: %r", exc, exc_info=True)
                with self._wake:
                    self._closing = self._given_up = True
                self._hand_over_all(broken=True)
                self._on_death()
        finally:
            self._flights.stop()
            self._end_all()

    def _on_end(self, flight: Flight, end: list[Any] | Exception, at: float) -> None:
        with self._wake:
            self._completed.append((flight, end, at))
            self._wake.notify()

    def _take_in(self) -> bool:
        """Wait for something to do and take in what came; False when closing."""
        with self._wake:
            while not (self._arrivals or self._cancelled or self._completed or self._closing or self._given_up):
                wait_s = self._wait_s(self._clock())
                if self._drain_at != self._drain_at_seen or (wait_s is not None and wait_s <= 0):
                    break
                self._wake.wait(wait_s)
            if self._closing or self._given_up:
                return False
            arrivals, cancelled, completed = list(self._arrivals), list(self._cancelled), list(self._completed)
            for queue in (self._arrivals, self._cancelled, self._completed):
                queue.clear()
            drains_anew, self._drain_at_seen = self._drain_at != self._drain_at_seen, self._drain_at
            for submission in arrivals:
                self._admit(submission)
        now = self._clock()
        if self._here:
            self.stats.active_s += now - self._counted_until
        self._counted_until = now
        for flight, end, at in completed:
            self._complete(flight, end, at)
        for task_id in cancelled:
            if task_id in self._here:
                self._leave(task_id, JobCancelled(task_id))
        if arrivals or cancelled or completed or drains_anew:
            self._nothing_to_plan = False
        if self._drain_at_seen is not None and (completed or drains_anew) and not self._parking:
            self._hand_over_late(self._drain_at_seen, now)
        return True

    def _admit(self, submission: Submission) -> None:
        task_id = submission.job.task_id
        if task_id in self._here:  # a redelivery of what is running here: it gets the same result
            submission.follow(self._here[task_id])
            return
        if submission.too_late or self._parking:
            self._hand_over(submission)
            return
        try:
            self._queue(submission)
        except (KeyError, ValueError) as exc:
            submission.settle(GenerationFailed(f"task {task_id} was not taken in: {exc}"))
            return
        self._here[task_id] = submission
        if submission.alone:
            self._quarantine.add(task_id)

    def _queue(self, submission: Submission) -> None:
        """Give a job to the policy, to start or to go on from its state."""
        job, steps = submission.job, submission.steps_done
        self._policy.add(job.task_id, job.lane, job.num_inference_steps, submission.arrived_at, submission.terms, steps)

    def _wait_s(self, now: float) -> float | None:
        """Return how long to sleep if nothing comes; None for as long as that."""
        if self._failure is not None:
            return None if self._flights else 0.0
        due_s = self._seconds_until_due(now)
        if self._drain_at is None or self._parking or not self._here:
            return due_s
        left_s = self._drain_at - now
        if left_s <= 0:
            return None if self._flights else 0.0
        return left_s if due_s is None else min(left_s, due_s)

    def _seconds_until_due(self, now: float) -> float | None:
        """Return how long to wait before the next dispatch; None while there is nothing to dispatch."""
        if self._nothing_to_plan or self._parking or not self._here or len(self._flights) >= TICKS_IN_FLIGHT:
            return None
        running = self._flights.oldest
        return running.ends_at - dispatch_lead_s(running.expected_s) - now if running else 0.0

    def _is_due(self, now: float) -> bool:
        wait_s = self._seconds_until_due(now)
        return wait_s is not None and wait_s <= 0

    def _dispatch(self, now: float) -> None:
        for task_id, reason in self._policy.overdue(now):
            self._leave(task_id, JobOverdue(reason))
        for task_id, submission in list(self._here.items()):
            if submission.started_at is None and not submission.may_start():
                self._leave(task_id, JobCancelled(task_id))
        self._admit_only(self._quarantine.admitted(not self._flights and not self._policy.counts()["running"]))
        if self._drain_at_seen is None:
            plan = self._policy.plan(now)
        else:
            plan = self._policy.plan(now, self._drain_at_seen - self._flights.ends_at(now))
        self.lowest_priority_running = self._policy.lowest_priority_running()
        if plan is None:
            self._nothing_to_plan = True
            return
        self._seat([*plan.inserted(), *(place.task_id for place in plan.resumed)], now)
        self._execute(plan)

    def _admit_only(self, task_ids: frozenset[str] | None) -> None:
        if task_ids != self._admitted:
            self._admitted = task_ids
            self._policy.admit_only(task_ids)

    def _seat(self, task_ids: Iterable[str], now: float) -> None:
        """Take note that jobs are about to get a slot, and say so."""
        news = []
        for task_id in task_ids:
            submission = self._here[task_id]
            submission.started_at = now if submission.started_at is None else submission.started_at
            submission.parked = False
            if not submission.announced:
                submission.announced = True
                news.append(task_id)
        if news:
            try:
                self._on_start(news, self._here[news[0]].alone)
            except Exception:
                logger.exception("on_start failed for the tasks %s", ", ".join(news))

    def _execute(self, plan: Plan) -> None:
        jobs = {task_id: self._here[task_id].job for task_id in plan.inserted()}
        snapshots = {place.task_id: self._here[place.task_id].snapshot for place in plan.resumed}
        concerned = {*plan.steps_done, *(task_id for *_, task_id in plan.decoded())}
        expected_s = self._policy.expected_s(plan)
        self._answer_due_at = self._flights.ends_at(self._clock()) + expected_s
        try:
            tick = self._engine.execute(plan, jobs, snapshots)
        except Exception as exc:
            self._failure = exc
            return
        finally:
            self._answer_due_at = None
        for task_id, snapshot in tick.parked.items():
            self._here[task_id].parked, self._here[task_id].snapshot = True, snapshot
        in_it = {task_id: self._here[task_id] for task_id in concerned if task_id in self._here}
        self._flights.launch(Flight(tick, plan, in_it, expected_s, self._clock()))

    def _complete(self, flight: Flight, end: list[Any] | Exception, now: float) -> None:
        """Deliver what a tick made; ticks end in the order in which they were dispatched."""
        if not self._flights.is_oldest(flight):
            return  # dispatched before a failure that emptied the slots
        if isinstance(end, Exception):
            self._recover(end)
            return
        self._flights.land(flight, now)
        plan, elapsed_s = flight.plan, now - flight.started_at
        if self._parking:
            for place in plan.parked:
                if place.task_id in self._here:
                    self._leave(place.task_id)
            return
        self._policy.update(Outcome(plan, elapsed_s))
        self._count(flight, elapsed_s)
        self._trace.tick(plan, flight.started_at, now)
        for image in end:
            self._deliver(flight, image, now)
        self._report_progress(flight, now)

    def _deliver(self, flight: Flight, image: Any, now: float) -> None:
        submission = flight.jobs.get(image.task_id)
        if submission is None or self._here.get(image.task_id) is not submission or submission.started_at is None:
            return  # cancelled while its last tick was in flight
        if image.finite:
            self.stats.images += 1
            at = flight.plan.occupied, submission.started_at, now
            self._leave(image.task_id, Finished(image.pixels, image.device, image.slot, *at))
            return
        reason = f"the model gave NaN or infinite values for this request on device {image.device}"
        if self._quarantine.is_alone(image.task_id):
            self._leave(image.task_id, GenerationFailed(reason))
        else:
            logger.error("task %s: %s; it is tried again, alone", image.task_id, reason)
            self._quarantine.add(image.task_id)
            submission.snapshot = None  # the values may be in there
            self._try_again(submission)

    def _report_progress(self, flight: Flight, now: float) -> None:
        """Let everybody know how far they are, from what was planned; nothing is read from the devices for it."""
        previews: Mapping[str, Any] = flight.tick.previews
        for task_id, steps in flight.plan.steps_done.items():
            submission = flight.jobs.get(task_id)
            if submission is None or submission.future.done() or submission.started_at is None:
                continue
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
        """A device program failed: make sure that the devices work, and try the jobs that had a slot again.

        Parked ones are not among them: their state is on the host.

        Raises:
            Exception: the devices are lost.
        """
        logger.error("a device program failed: %r", exc, exc_info=exc)
        self.stats.failures += 1
        self._failure, self._nothing_to_plan = None, False
        if self._parking:
            self._hand_over_all()
            self._flights.forget()
            return
        if self._engine.is_fatal(exc):
            raise exc
        self._answer_due_at = self._clock()
        try:
            self._engine.recover()
        finally:
            self._answer_due_at = None
        lost = self._flights.parking()
        self._flights.forget()
        suspects = [submission for submission in self._here.values() if submission.has_slot]
        at_fault = self._quarantine.failed([submission.job.task_id for submission in suspects])
        for submission in suspects:
            if submission.job.task_id == at_fault:
                cause = f"{type(exc).__name__}: {exc}"[:_MOST_CHARACTERS]
                self._leave(at_fault, GenerationFailed(f"the device program failed on this job alone: {cause}"))
            else:
                self._try_again(submission)
        for task_id in lost:
            parked = self._here.get(task_id)
            if parked and parked.parked and parked.usable_snapshot() is None:
                self._try_again(parked)

    def _try_again(self, submission: Submission) -> None:
        """Let a job wait for a slot once more, with its last state off the devices, or from the start."""
        self.stats.retried += 1
        self._policy.cancel(submission.job.task_id)
        submission.snapshot = submission.usable_snapshot()
        submission.steps_done = submission.snapshot.step if submission.snapshot is not None else 0
        submission.started_at, submission.parked = None, False
        submission.progress = replace(submission.progress, pending=True, description="waiting to be tried again")
        submission.moved.set()
        self._queue(submission)

    def _hand_over_late(self, drain_at: float, now: float) -> None:
        """Hand over the jobs without a slot that cannot be done in time."""
        etas, on_their_way = self._policy.etas_s(now), self._flights.parking()
        idle_s = self._flights.ends_at(now) - now  # the policy is that far ahead
        for task_id, submission in list(self._here.items()):
            is_late = now + idle_s + etas.get(task_id, float("inf")) > drain_at
            if is_late and not submission.has_slot and task_id not in on_their_way:
                self._leave(task_id)

    def _park_all(self) -> None:
        """The time is over: bring the state of every job from its slot, and hand all of them over."""
        if self._parking or self._flights:
            return
        self._parking = True
        places = self._policy.places() if self._here else {}
        running = {place.task_id for of_lane in places.values() for place in of_lane}
        for task_id in [task_id for task_id in self._here if task_id not in running]:
            self._leave(task_id)
        for lane, of_lane in places.items():
            for parked in _one_of_each_device(of_lane):
                nothing: tuple[()] = ()
                self._execute(Plan(lane, (nothing,) * self._policy.num_devices, parked=parked))

    def _give_up_in_time(self) -> None:
        """The watching thread: hand everything over when the devices, or the loop's thread, hang at the deadline."""
        with self._drain_asked:
            while not self._closing:
                left_s = None if self._drain_at is None else self._drain_at + self._patience_s - self._clock()
                if left_s is not None and left_s <= 0:
                    break
                self._drain_asked.wait(left_s)
        with self._wake:
            if self._closing or not (self._here or self._arrivals):
                return
            self._given_up = True
            self._wake.notify_all()
        logger.critical("the devices hang: their jobs are handed over without the last steps")
        self._hand_over_all(broken=True)

    def _hand_over_all(self, broken: bool = False) -> None:
        """Hand over every job with what is on the host of it. Any thread.

        Args:
            broken: the devices hang or are lost.
        """
        on_their_way = self._flights.parking()
        for submission in [*list(self._here.values()), *self._arrivals]:
            if submission.job.task_id in on_their_way:
                submission.snapshot = None
            self._hand_over(submission, suspect=broken and submission.has_slot)
        self._here.clear()
        self._arrivals.clear()

    def _end_all(self) -> None:
        """The loop stops: end what is still here."""
        if self._drain_at is not None:
            self._hand_over_all()
        for submission in [*list(self._here.values()), *self._arrivals]:
            submission.settle(EngineUnavailable("the worker stopped before this job was done"))

    def _hand_over(self, submission: Submission, suspect: bool = False) -> None:
        if submission.settle(JobHandedOver(submission.snapshot, suspect)):
            self.stats.handed_over += 1

    def _leave(self, task_id: str, end: Finished | Exception | None = None) -> None:
        """End a job; without an end, hand it over."""
        submission = self._here.pop(task_id)
        self._quarantine.discard(task_id)
        self._policy.cancel(task_id)
        if end is None:
            self._hand_over(submission)
        else:
            submission.settle(end)

    def _count(self, flight: Flight, elapsed_s: float) -> None:
        self.stats.count(flight.plan, elapsed_s)
        for task_id, steps in flight.plan.steps_done.items():
            if submission := flight.jobs.get(task_id):
                self.stats.job_steps += steps - submission.steps_done
                submission.steps_done = steps


def _one_of_each_device(places: Iterable[Place]) -> list[tuple[Place, ...]]:
    """Return the places in groups with no two of one device."""
    groups: list[dict[int, Place]] = []
    for place in places:
        group = next((group for group in groups if place.device not in group), None)
        if group is None:
            groups.append(group := {})
        group[place.device] = place
    return [tuple(group.values()) for group in groups]
