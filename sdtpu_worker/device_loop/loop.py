"""The device loop: it accepts jobs, asks the policy for plans, keeps the devices busy and ends jobs with their images.

It knows neither Celery nor JAX: see `protocols.py` for what it uses of an engine and a policy.

At most two ticks are in flight. The second is dispatched shortly before the first is expected to end.

A device program that fails costs only the job at fault its image. All jobs that had a slot are tried again, apart from
other jobs and from each other (`aggregator/quarantine.py`). The other devices continue when one is lost. When all
are lost, and when a worker stops (`drain`), no job loses its image either: another worker continues it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.plan import Outcome, Plan, one_of_each_device
from sdtpu_worker.device_loop.inbox import Inbox
from sdtpu_worker.device_loop.job_table import JobTable
from sdtpu_worker.device_loop.listeners import tell
from sdtpu_worker.device_loop.protocols import DeviceEngine, Image, Job, Policy, Snapshot
from sdtpu_worker.device_loop.stages import LoopStage
from sdtpu_worker.device_loop.stats import LoopStats
from sdtpu_worker.device_loop.submission import Submission, is_of_job
from sdtpu_worker.device_loop.ticks_in_flight import TickInFlight, TicksInFlight
from sdtpu_worker.device_loop.trace import NoTrace, Trace
from sdtpu_worker.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0


class DeviceLoop:
    """Runs plans until it is closed. `submit`, `cancel`, `drain`, `close` and the properties: from any thread.

    Args:
        engine: executes the plans.
        policy: makes the plans; only this loop's thread uses it from now on.
        on_death: called when the loop cannot continue (the devices are lost), after it has handed its jobs over.
        trace: where the timeline of the run goes.
        clock: monotonic seconds.
        on_start: told, in the loop's thread, which tasks are about to get their first slot here, and whether all other
            jobs have left the devices; the start of such another job is announced again when it resumes.
        on_tick: told, in the loop's thread, of every tick that ended well: its plan, its start and its end.
        patience_s: how long after the deadline of `drain` the loop waits for devices that do not answer.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        policy: Policy,
        on_death: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_start: Callable[[Sequence[str], bool], None] = lambda task_ids, alone: None,
        on_tick: Callable[[Plan, float, float], None] = lambda plan, started_at, ended_at: None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._engine, self._policy, self._clock = engine, policy, clock
        self._on_death, self._on_start, self._on_tick = on_death, on_start, on_tick
        self._trace, self._patience_s = trace or NoTrace(), patience_s
        self.lowest_priority_running: int | None = None
        self.stats = LoopStats(device_busy_s=[0.0] * policy.num_devices)
        self._stage = LoopStage.RUNNING
        self._inbox, self._jobs = Inbox(), JobTable(policy, self.stats, engine.lost_devices)
        self._ticks = TicksInFlight(engine, self._inbox.end, self._trace, clock)
        self._failure: Exception | None = None  # of a dispatch; handled when the ticks in flight have ended
        self._nothing_to_plan = False  # the policy said so, and nothing has come since
        self._is_logged = False
        self._counted_until = clock()
        self._thread = threading.Thread(target=self._run, name="sdtpu-device-loop", daemon=True)
        self._watch = threading.Thread(target=self._give_up_in_time, name="sdtpu-device-watch", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        for thread in (self._ticks.thread, self._watch, self._thread):
            thread.start()

    @property
    def stage(self) -> LoopStage:
        """How far the loop is on the way to its end."""
        return self._stage

    @property
    def alive(self) -> bool:
        """Whether the loop runs: it was started, and is neither closed nor dead."""
        return not self._inbox.is_closed and self._thread.is_alive() and self._ticks.thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """By how many seconds the devices are late with the oldest tick, or the engine with an answer; 0.0 if not."""
        return self._ticks.late_s(self._clock())

    def submit(
        self,
        job: Job,
        terms: Terms | None = None,
        may_start: Callable[[], bool] = lambda: True,
        snapshot: Snapshot | None = None,
        alone: bool = False,
    ) -> Submission:
        """Queue a job.

        Args:
            job: prepared by the engine.
            terms: priority, deadline and limits, on this loop's clock.
            may_start: asked again and again, in the loop's thread, until the job has its slot.
            snapshot: what the job resumes from; None to start. A snapshot of another configuration, of a step that the
                job does not have, or with a NaN, is dropped, and the job starts from the beginning.
            alone: no other job may be on the devices with this one, and a failure is this job's fault at once; for
                jobs that were on the devices of workers that died.

        Returns:
            With a future of `Finished`. It raises `GenerationFailed` when the devices failed on this job,
            `JobCancelled` after `cancel` or when `may_start` said no, `JobOverdue`, `JobHandedOver` when the devices
            are lost or the worker drains, and `EngineUnavailable` when the loop is closed.

        Raises:
            EngineUnavailable: the loop is closed already.
        """
        if snapshot is not None and not (self._engine.accepts(snapshot) and is_of_job(snapshot, job)):
            logger.warning("task %s starts anew: its snapshot is of another configuration or job", job.task_id)
            snapshot = None
        submission = Submission.of(job, terms or Terms(), may_start, snapshot, alone, self._clock())
        if not self._inbox.submit(submission):
            if self._stage is not LoopStage.GIVEN_UP:
                raise EngineUnavailable("the device loop is closed: the worker is stopping")
            self._jobs.hand_over(submission)
        return submission

    def cancel(self, task_id: str) -> None:
        """Take a job off the queue or its slot at the next tick; unknown ids are ignored."""
        self._inbox.cancel(task_id)

    def drain(self, grace_s: float) -> None:
        """Finish the jobs that can be finished within this time, and hand over all other jobs with their snapshots.

        A waiting job, or one that comes later, is handed over at once if it cannot be done in time. At the deadline
        the running jobs are parked, after the ticks that are in flight, and handed over. Afterwards there is nothing
        to do but `close`. A second call may bring the deadline forward, also from a signal handler: it never waits.

        Args:
            grace_s: seconds from now; 0 to hand over at once.
        """
        with self._inbox.lock:
            self._inbox.drain(self._clock() + max(0.0, grace_s))
            self._enter(LoopStage.DRAINING)

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the threads; jobs that are left fail with `EngineUnavailable`, or are handed over if the loop drains."""
        self._end_jobs(self._inbox.close())
        self._enter(LoopStage.CLOSED)
        deadline = time.monotonic() + (0.1 if self._stage is LoopStage.GIVEN_UP else timeout_s)
        for thread in (self._thread, self._ticks.thread, self._watch):
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._enter(LoopStage.GIVEN_UP)
        self._end_jobs()
        self._trace.close()
        if not self._is_logged:
            self._is_logged = True
            logger.info("the device loop is closed: %s", json.dumps(self.stats.to_json()))

    def _enter(self, stage: LoopStage) -> None:
        """Enter a stage, unless the loop is in a later one. Any thread."""
        with self._inbox.lock:
            self._stage = max(self._stage, stage)

    def _run(self) -> None:
        try:
            while self._take_in():
                now = self._clock()
                if self._failure is not None:
                    if not self._ticks:
                        self._recover(self._failure)
                elif self._inbox.drain_at is not None and now >= self._inbox.drain_at:
                    self._park_all(now)
                elif self._is_due(now):
                    self._dispatch(now)
        except BaseException as exc:
            if self._stage is not LoopStage.GIVEN_UP:
                logger.critical("the device loop died: %r", exc, exc_info=True)
                self._enter(LoopStage.GIVEN_UP)
                self._hand_over_all(self._inbox.close(), broken=True)
                self._on_death()
        finally:
            self._ticks.stop()
            self._end_jobs()

    def _take_in(self) -> bool:
        """Wait until something came or is due, and handle what came; return False when the loop is closed."""
        was_active = bool(self._jobs)
        if (mail := self._inbox.take(self._wait_s, self._accept)) is None:
            return False
        now = self._clock()
        if was_active:
            self.stats.active_s += now - self._counted_until
        self._counted_until = now
        for tick, end, at in mail.ended:
            self._complete(tick, end, at)
        for task_id in mail.cancelled:
            self._jobs.cancel(task_id)
        if mail:
            self._nothing_to_plan = False
        if mail and self._stage is LoopStage.DRAINING and self._inbox.drain_at is not None:
            left_s = self._inbox.drain_at - self._ticks.ends_at(now)
            self._jobs.hand_over_waiting(left_s, now, self._ticks.parking())
        return True

    def _accept(self, submission: Submission) -> None:
        self._jobs.add(submission, hands_over=self._stage >= LoopStage.PARKING)

    def _wait_s(self) -> float | None:
        """Return how long to sleep if nothing comes; None to sleep until something does."""
        now, drain_at = self._clock(), self._inbox.drain_at
        if self._failure is not None:
            return None if self._ticks else 0.0
        due_s = self._seconds_until_due(now)
        if drain_at is None or self._stage >= LoopStage.PARKING or not self._jobs:
            return due_s
        if now >= drain_at:
            return None if self._ticks else 0.0
        return drain_at - now if due_s is None else min(drain_at - now, due_s)

    def _seconds_until_due(self, now: float) -> float | None:
        """Return how long to wait before the next dispatch; None while there is nothing to dispatch."""
        if self._nothing_to_plan or self._stage >= LoopStage.PARKING or not self._jobs:
            return None
        return self._ticks.seconds_until_next(now)

    def _is_due(self, now: float) -> bool:
        wait_s = self._seconds_until_due(now)
        return wait_s is not None and wait_s <= 0

    def _dispatch(self, now: float) -> None:
        """Ask the policy for the next plan, announce the jobs that start, and execute it."""
        self._jobs.drop_unwanted(now)
        self._jobs.set_eligible(not self._ticks, now)
        if (drain_at := self._inbox.drain_at) is None:
            plan = self._policy.plan(now)
        else:
            plan = self._policy.plan(now, drain_at - self._ticks.ends_at(now))
        self.lowest_priority_running = self._policy.lowest_priority_running()
        if plan is None:
            self._nothing_to_plan = True
            return
        if news := self._jobs.start(plan.placed(), now):
            tell(self._on_start, news, self._jobs[news[0]].alone)
        self._execute(plan)

    def _execute(self, plan: Plan) -> None:
        jobs = {task_id: self._jobs[task_id].job for task_id in plan.inserted()}
        snapshots = {place.task_id: self._jobs[place.task_id].snapshot for place in plan.resumed}
        in_tick = self._jobs.pick({*plan.steps_done, *(image.task_id for image in plan.decoded())})
        try:
            tick = self._ticks.dispatch(plan, jobs, snapshots, in_tick, self._policy.expected_s(plan))
        except Exception as exc:
            self._failure = exc
            return
        for task_id, snapshot in tick.executed.parked.items():
            self._jobs[task_id].park(snapshot)

    def _complete(self, tick: TickInFlight, end: Sequence[Image] | Exception, now: float) -> None:
        """Deliver the images of a tick; ticks end in the order in which they were dispatched."""
        if not self._ticks.is_oldest(tick):
            return  # dispatched before a failure that emptied the slots
        if isinstance(end, Exception):
            self._recover(end)
            return
        self._ticks.remove(tick, now)
        if self._stage >= LoopStage.PARKING:
            self._jobs.hand_over_parked(tick.executed.parked)
            return
        plan, elapsed_s = tick.plan, now - tick.started_at
        self._policy.update(Outcome(plan, elapsed_s))
        self.stats.count(plan, elapsed_s, tick.count_steps())
        self._trace.tick(plan, tick.started_at, now)
        tell(self._on_tick, plan, tick.started_at, now)
        for image in end:
            self._jobs.deliver(tick, image, now)
        self._jobs.check_parked(tick)
        if self._jobs.needs_verdict:
            idle = not self._ticks and not self._policy.counts()["running"]
            self._jobs.judge(self._ticks.check_devices(self.stats.lost_devices) if idle else ())
        self._jobs.update_progress(tick, now)

    def _recover(self, exc: Exception) -> None:
        """Make sure that the devices work after a device program failed, and try the suspects again.

        Raises:
            Exception: the devices are lost.
        """
        logger.error("a device program failed: %r", exc, exc_info=exc)
        self.stats.failures += 1
        self._failure, self._nothing_to_plan = None, False
        if self._stage >= LoopStage.PARKING:
            self._hand_over_all()
            self._ticks.forget()
            return
        if self._engine.is_fatal(exc):
            raise exc
        parking = self._ticks.parking()
        self._jobs.blame(exc, parking, self._ticks.recover(self.stats.lost_devices))

    def _park_all(self, now: float) -> None:
        """Hand over the waiting jobs at the deadline, and bring the state of every running job to the host."""
        if self._stage >= LoopStage.PARKING or self._ticks or not self._jobs:
            return
        self._enter(LoopStage.PARKING)
        self._jobs.hand_over_waiting(-math.inf, now, ())
        for lane, places in self._policy.places().items():
            for parked in one_of_each_device(places):
                self._execute(Plan(lane, ((),) * self._policy.num_devices, parked=parked))

    def _give_up_in_time(self) -> None:
        """Hand over every job when the devices, or the loop's thread, hang at the deadline. The watching thread."""
        if self._inbox.wait_until_overdue(self._patience_s, self._clock) and self._jobs:
            self._enter(LoopStage.GIVEN_UP)
            logger.critical("the devices hang: their jobs are handed over without the steps since their last snapshot")
            self._hand_over_all(self._inbox.close(), broken=True)

    def _hand_over_all(self, arrivals: Sequence[Submission] = (), broken: bool = False) -> None:
        """Hand over every job with the snapshot that is on the host. Any thread.

        Args:
            arrivals: jobs that the loop has not accepted.
            broken: the devices hang or are lost.
        """
        self._jobs.hand_over_all(self._ticks.parking(), broken)
        for submission in arrivals:
            self._jobs.hand_over(submission)

    def _end_jobs(self, arrivals: Sequence[Submission] = ()) -> None:
        """End the jobs that are left when the loop stops: hand them over if it drains."""
        if self._inbox.drain_at is not None:
            self._hand_over_all(arrivals)
        stopped = EngineUnavailable("the worker stopped before this job was done")
        self._jobs.end_all(stopped)
        for submission in arrivals:
            submission.settle(stopped)
