"""The device thread: collects jobs, asks the policy for plans, keeps the devices busy, hands images out.

Knows neither Celery nor JAX: the engine is anything with `execute(plan, jobs, snapshots) -> tick`, `tick.wait() ->
images` and `recover()` (see `sdtpu_worker.testing.fake_engine.FakeEngine`).

Two ticks are in flight at most. The second is dispatched shortly before the first is expected to end: early enough
that the devices never wait, late enough that a job which comes now is in it.

A program that fails costs nobody but the job that is at fault: all that had a slot are tried again, apart from the
others and from each other (`quarantine`). Devices that are lost, and a worker that stops (`drain`), cost no job
anything: another worker goes on with it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.plan import Outcome, Plan, one_of_each_device
from sdtpu_worker.device_loop.inbox import Inbox
from sdtpu_worker.device_loop.job_table import JobTable
from sdtpu_worker.device_loop.protocols import DeviceEngine, Job, Policy
from sdtpu_worker.device_loop.stats import LoopStats
from sdtpu_worker.device_loop.submission import (  # noqa: F401  importable from here too
    Finished,
    JobCancelled,
    JobHandedOver,
    JobOverdue,
    Progress,
    Submission,
)
from sdtpu_worker.device_loop.ticks_in_flight import TICKS_IN_FLIGHT, Flight, Flights, dispatch_lead_s
from sdtpu_worker.device_loop.trace import NoTrace, Trace
from sdtpu_worker.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0


class DeviceLoop:
    """Runs plans until it is closed. `submit`, `cancel`, `drain`, `close` and the properties: from any thread.

    Args:
        engine: who executes the plans.
        policy: who makes them; owned by this loop's thread from now on.
        on_death: called when the loop cannot go on (the devices are lost), after its jobs were handed over.
        trace: where the timeline of the run goes.
        clock: monotonic seconds.
        on_start: told which tasks are about to get their first slot here, and whether all other jobs here have left
            the devices (it is told again of those that come back), in the loop's thread.
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
        self._patience_s = patience_s
        self.lowest_priority_running: int | None = None
        self.stats = LoopStats(device_busy_s=[0.0] * policy.num_devices)
        self._inbox, self._jobs = Inbox(), JobTable(policy, self.stats)
        self._flights = Flights(self._inbox.end, self._trace, clock)
        self._failure: Exception | None = None  # of a dispatch; taken care of when what is in flight has ended
        self._answer_due_at: float | None = None  # when a call of the engine should be back that is under way
        self._nothing_to_plan = self._parking = self._given_up = self._is_logged = False
        self._counted_until = clock()
        self._thread = threading.Thread(target=self._run, name="sdtpu-device-loop", daemon=True)
        self._watch = threading.Thread(target=self._give_up_in_time, name="sdtpu-device-watch", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        for thread in (self._flights.thread, self._watch, self._thread):
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs: started, neither closed nor dead."""
        return not self._inbox.is_closed and self._thread.is_alive() and self._flights.thread.is_alive()

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
            snapshot: the state to go on from, with its `step`; None to start. One of another configuration, or with
                a step that the job does not have, is dropped, and the job starts anew.
            alone: no other job may be on the devices with it, and a failure is its own fault at once; for jobs that
                were there when workers died.

        Returns:
            With a future of `Finished`. It raises `GenerationFailed` when the device failed on this job,
            `JobCancelled` after `cancel` or a no of `may_start`, `JobOverdue`, `JobHandedOver` when the devices are
            lost or the worker drains, `EngineUnavailable` when the loop is closed.

        Raises:
            EngineUnavailable: it is closed already.
        """
        fits = snapshot is None or (self._engine.accepts(snapshot) and 0 <= snapshot.step <= job.num_inference_steps)
        if not fits:
            logger.warning(
                "task %s starts anew: its state is of another configuration or of no step of it", job.task_id
            )
            snapshot = None
        steps_done = snapshot.step if snapshot is not None else 0
        progress = Progress(steps_done, job.num_inference_steps, True, "waiting for a slot")
        submission = Submission(
            job, terms or Terms(), may_start, snapshot, progress, self._clock(), alone, steps_done=steps_done
        )
        submission.future.add_done_callback(lambda _: submission.moved.set())
        if not self._inbox.submit(submission):
            if not self._given_up:
                raise EngineUnavailable("the device loop is closed: the worker is stopping")
            self._jobs.hand_over(submission)
        return submission

    def cancel(self, task_id: str) -> None:
        """Take a job off the queue or its slot at the next tick; unknown ids are ignored."""
        self._inbox.cancel(task_id)

    def drain(self, grace_s: float) -> None:
        """Finish what can be finished within this time and hand over the rest, with its state: `JobHandedOver`.

        Jobs that wait, or come now, and cannot be done in time end at once. At the deadline those that run are
        taken off their slots, after the ticks that are in flight. Afterwards there is nothing to do but `close`.
        May be called again to shorten the time, also by a signal handler: it never waits.

        Args:
            grace_s: from now; 0 to hand over at once.
        """
        self._inbox.drain(self._clock() + max(0.0, grace_s))

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the threads; jobs that are still here fail with `EngineUnavailable`, or are handed over if it drains."""
        self._end(self._inbox.close())
        deadline = time.monotonic() + (0.1 if self._given_up else timeout_s)
        for thread in (self._thread, self._flights.thread, self._watch):
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._given_up |= self._thread.is_alive()
        self._end()
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
                elif self._inbox.drain_at is not None and now >= self._inbox.drain_at:
                    self._park_all(now)
                elif self._is_due(now):
                    self._dispatch(now)
        except BaseException as exc:
            if not self._given_up:
                logger.critical("the device loop died: %r", exc, exc_info=True)
                self._given_up = True
                self._hand_over_all(self._inbox.close(), broken=True)
                self._on_death()
        finally:
            self._flights.stop()
            self._end()

    def _take_in(self) -> bool:
        """Wait for something to do and take in what came; False when closing."""
        was_active = bool(self._jobs)
        mail = self._inbox.take(self._wait_s, self._admit)
        if mail is None:
            return False
        now = self._clock()
        if was_active:
            self.stats.active_s += now - self._counted_until
        self._counted_until = now
        for flight, end, at in mail.ended:
            self._complete(flight, end, at)
        for task_id in mail.cancelled:
            self._jobs.cancel(task_id)
        if mail:
            self._nothing_to_plan = False
        if self._inbox.drain_at is not None and mail and not self._parking:
            self._hand_over_waiting(self._inbox.drain_at, now)
        return True

    def _admit(self, submission: Submission) -> None:
        self._jobs.admit(submission, self._parking)

    def _wait_s(self) -> float | None:
        """Return how long to sleep if nothing comes; None for as long as that."""
        now, drain_at = self._clock(), self._inbox.drain_at
        if self._failure is not None:
            return None if self._flights else 0.0
        due_s = self._seconds_until_due(now)
        if drain_at is None or self._parking or not self._jobs:
            return due_s
        if now >= drain_at:
            return None if self._flights else 0.0
        return drain_at - now if due_s is None else min(drain_at - now, due_s)

    def _seconds_until_due(self, now: float) -> float | None:
        """Return how long to wait before the next dispatch; None while there is nothing to dispatch."""
        if self._nothing_to_plan or self._parking or not self._jobs or len(self._flights) >= TICKS_IN_FLIGHT:
            return None
        running = self._flights.oldest
        return running.ends_at - dispatch_lead_s(running.expected_s) - now if running else 0.0

    def _is_due(self, now: float) -> bool:
        wait_s = self._seconds_until_due(now)
        return wait_s is not None and wait_s <= 0

    def _dispatch(self, now: float) -> None:
        self._jobs.drop_unwanted(now)
        self._jobs.tell_policy_who_may_start(not self._flights, now)
        if (drain_at := self._inbox.drain_at) is None:
            plan = self._policy.plan(now)
        else:
            plan = self._policy.plan(now, drain_at - self._flights.ends_at(now))
        self.lowest_priority_running = self._policy.lowest_priority_running()
        if plan is None:
            self._nothing_to_plan = True
            return
        if news := self._jobs.seat([*plan.inserted(), *(place.task_id for place in plan.resumed)], now):
            try:
                self._on_start(news, self._jobs[news[0]].alone)
            except Exception:
                logger.exception("on_start failed for the tasks %s", ", ".join(news))
        self._execute(plan)

    def _execute(self, plan: Plan) -> None:
        jobs = {task_id: self._jobs[task_id].job for task_id in plan.inserted()}
        snapshots = {place.task_id: self._jobs[place.task_id].snapshot for place in plan.resumed}
        in_it = self._jobs.pick({*plan.steps_done, *(task_id for *_, task_id in plan.decoded())})
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
            self._jobs[task_id].parked, self._jobs[task_id].snapshot = True, snapshot
        self._flights.launch(Flight(tick, plan, in_it, expected_s, self._clock()))

    def _complete(self, flight: Flight, end: list[Any] | Exception, now: float) -> None:
        """Deliver what a tick made; ticks end in the order in which they were dispatched."""
        if not self._flights.is_oldest(flight):
            return  # dispatched before a failure that emptied the slots
        if isinstance(end, Exception):
            self._recover(end)
            return
        self._flights.land(flight, now)
        if self._parking:
            self._jobs.hand_over_parked(flight.tick.parked)
            return
        plan, elapsed_s = flight.plan, now - flight.started_at
        self._policy.update(Outcome(plan, elapsed_s))
        self.stats.count(plan, elapsed_s, flight.steps_taken())
        self._trace.tick(plan, flight.started_at, now)
        for image in end:
            self._jobs.deliver(flight, image, now)
        self._jobs.report(flight, now)

    def _recover(self, exc: Exception) -> None:
        """A device program failed: make sure that the devices work, and try the jobs that had a slot again.

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
        parking = self._flights.parking()
        self._flights.forget()
        self._jobs.blame(exc, parking)

    def _hand_over_waiting(self, drain_at: float, now: float) -> None:
        self._jobs.hand_over_waiting(drain_at - self._flights.ends_at(now), now, self._flights.parking())

    def _park_all(self, now: float) -> None:
        """The time is over: bring the state of every job from its slot, and hand all of them over."""
        if self._parking or self._flights or not self._jobs:
            return
        self._parking = True
        self._jobs.hand_over_waiting(-math.inf, now, ())
        for lane, places in self._policy.places().items():
            for parked in one_of_each_device(places):
                self._execute(Plan(lane, ((),) * self._policy.num_devices, parked=parked))

    def _give_up_in_time(self) -> None:
        """The watching thread: hand everything over when the devices, or the loop's thread, hang at the deadline."""
        if self._inbox.wait_until_overdue(self._patience_s, self._clock) and self._jobs:
            self._given_up = True
            logger.critical("the devices hang: their jobs are handed over without the last steps")
            self._hand_over_all(self._inbox.close(), broken=True)

    def _hand_over_all(self, arrivals: Sequence[Submission] = (), broken: bool = False) -> None:
        """Hand over every job with what is on the host of it. Any thread.

        Args:
            arrivals: jobs that nobody took in.
            broken: the devices hang or are lost.
        """
        self._jobs.hand_over_all(self._flights.parking(), broken)
        for submission in arrivals:
            self._jobs.hand_over(submission)

    def _end(self, arrivals: Sequence[Submission] = ()) -> None:
        """The loop stops: end what is still here."""
        if self._inbox.drain_at is not None:
            self._hand_over_all(arrivals)
        stopped = EngineUnavailable("the worker stopped before this job was done")
        self._jobs.end_all(stopped)
        for submission in arrivals:
            submission.settle(stopped)
