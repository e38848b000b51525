"""The jobs in the device loop: which of them wait, run, are parked or are tried again. Each of them ends exactly once.

The loop's thread owns the table; a method that any thread may call says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from sdtpu_worker.aggregator.jobs import EVERY_JOB
from sdtpu_worker.aggregator.quarantine import Quarantine
from sdtpu_worker.device_loop.device_records import MOST_STRIKES, DeviceRecords
from sdtpu_worker.device_loop.protocols import Image, Policy
from sdtpu_worker.device_loop.stages import JobStage
from sdtpu_worker.device_loop.stats import LoopStats
from sdtpu_worker.device_loop.submission import Finished, JobCancelled, JobHandedOver, JobOverdue, Submission
from sdtpu_worker.device_loop.ticks_in_flight import TickInFlight
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed

logger = logging.getLogger(__name__)

_ETA_EVERY_S = 0.2
_NO_REFERENCE_IMAGE = "it does not draw the reference image as the others do"
_STRUCK_OUT = f"{MOST_STRIKES} jobs failed on it which other devices did without a fault"
_MOST_CHARACTERS = 1000  # XLA's errors can bring pages of source locations


class JobTable:
    """All jobs by task id. The policy has the same jobs.

    Args:
        policy: decides which job gets a slot.
        stats: where retries, images, jobs that were handed over and lost devices are counted.
        lost: devices that are lost from the start.

    Attributes:
        needs_verdict: a job or a device is in doubt: the loop should have the devices checked, and call `judge`.
    """

    def __init__(self, policy: Policy, stats: LoopStats, lost: Collection[int] = ()) -> None:
        self._policy, self._stats = policy, stats
        self._jobs: dict[str, Submission] = {}
        self._quarantine, self._records = Quarantine(), DeviceRecords()
        self._accused: list[tuple[Submission, int, str]] = []  # failed alone on a device, with what was seen
        self.needs_verdict = False
        self._eligibility = EVERY_JOB
        self._etas_at = -math.inf
        self.lose(lost)

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, task_id: str) -> Submission:
        return self._jobs[task_id]

    def pick(self, task_ids: Iterable[str]) -> dict[str, Submission]:
        """Return the jobs with these task ids that are in the table, by task id."""
        return {task_id: self._jobs[task_id] for task_id in task_ids if task_id in self._jobs}

    def add(self, submission: Submission, hands_over: bool) -> None:
        """Add a job, or end it at once.

        Args:
            submission: a job that the policy does not know yet.
            hands_over: the loop starts no job any more; a new job is handed over.
        """
        task_id = submission.job.task_id
        if task_id in self._jobs:  # a redelivered message of a job that is here already: it gets the same result
            submission.follow(self._jobs[task_id])
            return
        if hands_over:
            self.hand_over(submission)
            return
        try:
            self._queue(submission)
        except (KeyError, ValueError) as exc:
            submission.settle(GenerationFailed(f"the policy of this worker did not accept task {task_id}: {exc}"))
            return
        self._jobs[task_id] = submission
        if submission.alone:
            self._quarantine.add(task_id)

    def cancel(self, task_id: str) -> None:
        """End a job that is not wanted any more; unknown ids are ignored."""
        if task_id in self._jobs:
            self._end(task_id, JobCancelled(task_id))

    def drop_unwanted(self, now: float) -> None:
        """End the jobs whose time is over, and waiting jobs that may not start any more."""
        for task_id, reason in self._policy.overdue(now):
            self._end(task_id, JobOverdue(reason))
        for task_id, submission in list(self._jobs.items()):
            if submission.started_at is None and not submission.may_start():  # WAITING or RETRYING
                self._end(task_id, JobCancelled(task_id))

    def set_eligible(self, nothing_in_flight: bool, now: float) -> None:
        """Tell the policy which jobs may have a slot: a quarantined group alone, when it is its turn."""
        devices_idle = nothing_in_flight and not self._policy.counts()["running"]
        other_jobs = len(self._jobs) > len(self._quarantine)
        eligibility = self._quarantine.eligibility(devices_idle, now, other_jobs)
        if eligibility != self._eligibility:
            self._eligibility = eligibility
            self._policy.set_eligible(eligibility)

    def start(self, devices: Mapping[str, int], now: float) -> list[str]:
        """Note that jobs are about to get a slot of a device; return the jobs whose start the loop has to announce.

        These are the jobs that get their first slot here. A job that was parked for a job that must be alone is
        announced again when it resumes.
        """
        news = []
        for task_id, submission in self.pick(devices).items():
            submission.start(now, devices[task_id])
            if not submission.announced:
                submission.announced = True
                news.append(task_id)
        if news and self._jobs[news[0]].alone:
            for submission in self._jobs.values():  # all other jobs have left the devices, and may come back
                submission.announced &= submission.job.task_id in news
        return news

    def deliver(self, tick: TickInFlight, image: Image, now: float) -> None:
        """End a job with its image; a job whose image is not finite is tried again, alone and on another device."""
        submission = tick.jobs.get(image.task_id)
        if submission is None or self._jobs.get(image.task_id) is not submission or submission.started_at is None:
            return  # cancelled while its last tick was in flight
        if image.finite:
            self._stats.images += 1
            self._records.well_done(image.device)
            for device in submission.failed_on.keys() - {image.device}:
                self._records.strike(device, image.task_id)
                self.needs_verdict = True
            at = tick.plan.occupied, submission.started_at, now
            self._end(image.task_id, Finished(image.pixels, image.device, image.slot, *at))
            return
        self._not_finite(submission, image.device)

    def check_parked(self, tick: TickInFlight) -> None:
        """Try the jobs again whose states had a NaN when a tick brought them to the host: as for an image with one."""
        for place in tick.plan.parked:
            submission, snapshot = self._jobs.get(place.task_id), tick.executed.parked[place.task_id]
            if submission is not None and submission.snapshot is snapshot and not snapshot.finite:
                self._not_finite(submission, place.device)

    def blame(self, exc: Exception, parking: Collection[str], lost: Collection[int]) -> None:
        """Try the suspects of a device program that failed again, or end the job that is at fault.

        Args:
            exc: what the device program raised; it took the slots of all devices with it.
            parking: jobs whose snapshots were on their way to the host; other parked jobs lose nothing.
            lost: devices that did not draw the reference image afterwards.
        """
        suspects = [submission for submission in self._jobs.values() if submission.has_slot]
        at_fault = self._quarantine.failed([submission.job.task_id for submission in suspects])
        for submission in suspects:
            if submission.job.task_id == at_fault:
                cause = f"{type(exc).__name__}: {exc}"[:_MOST_CHARACTERS]
                self._accuse(submission, submission.device, f"the device program failed on this job alone: {cause}")
            else:
                submission.failed_in_company += not lost
                self._try_again(submission)
        for submission in self.pick(parking).values():
            if submission.stage is JobStage.PARKED and submission.usable_snapshot() is None:
                self._try_again(submission)
        self.judge(lost)

    def judge(self, lost: Collection[int]) -> None:
        """Find out who is at fault, devices or jobs.

        A lost device gets no job any more. A job that failed alone is at fault when it failed on two devices that
        draw the reference image, or twice when there is no other device for another try.

        Args:
            lost: devices that did not draw the reference image just now.

        Raises:
            EngineUnavailable: there is no device left.
        """
        self.lose(lost)
        self.lose(self._records.struck_out(), _STRUCK_OUT)
        accused, self._accused, self.needs_verdict = self._accused, [], False
        for submission, device, reason in accused:
            if device not in self._stats.lost_devices:
                submission.failed_on[device] += 1
                if self._is_at_fault(submission):
                    self._end(submission.job.task_id, GenerationFailed(reason))
                    continue
            self._try_alone(submission, reason)

    def lose(self, devices: Iterable[int], reason: str = _NO_REFERENCE_IMAGE) -> None:
        """Give devices no job any more, and try the jobs again that have a slot there.

        Raises:
            EngineUnavailable: there is no device left.
        """
        lost = self._stats.lost_devices
        for device in sorted(set(devices) - set(lost)):
            left = self._policy.num_devices - len(lost) - 1
            logger.critical("device %d is lost: %s; %d devices are left", device, reason, left)
            lost.append(device)
            if not left:
                raise EngineUnavailable(f"device {device} was the last one, and is lost: {reason}")
            for submission in self.pick(self._policy.exclude(device)).values():
                submission.snapshot = None
                self._try_again(submission)
            for submission in self._jobs.values():
                submission.failed_on.pop(device, None)

    def update_progress(self, tick: TickInFlight, now: float) -> None:
        """Set how far every job of a tick is, from what was planned; nothing is read from the devices for it."""
        for task_id, steps in tick.plan.steps_done.items():
            submission = tick.jobs.get(task_id)
            if submission is not None and submission.stage in (JobStage.RUNNING, JobStage.PARKED):
                submission.update_progress(steps, tick.executed.previews.get(task_id))
        is_new = any(submission.progress.eta_s is None for submission in self._jobs.values())
        if is_new or now - self._etas_at >= _ETA_EVERY_S:
            self._etas_at = now
            for task_id, eta_s in self._policy.etas_s(now).items():
                if submission := self._jobs.get(task_id):
                    submission.progress = replace(submission.progress, eta_s=eta_s)

    def hand_over(self, submission: Submission, suspect: bool = False) -> None:
        """End a job without a result, so that another worker continues it from its snapshot. Any thread.

        Args:
            submission: a job that the policy does not have any more.
            suspect: the job had a slot when the devices hung or were lost.
        """
        if submission.settle(JobHandedOver(submission.snapshot, suspect, submission.had_slot)):
            self._stats.handed_over += 1

    def hand_over_parked(self, task_ids: Iterable[str]) -> None:
        """Hand over jobs whose snapshots have come from the devices."""
        for task_id, submission in self.pick(task_ids).items():
            submission.snapshot = submission.usable_snapshot()
            self._end(task_id)

    def hand_over_waiting(self, left_s: float, now: float, parking: Collection[str]) -> None:
        """Hand over the jobs without a slot that cannot be done in time.

        Args:
            left_s: seconds until the deadline, from when the ticks in flight should have ended.
            now: the time in seconds.
            parking: jobs whose snapshots are still on their way to the host.
        """
        etas = self._policy.etas_s(now)
        for task_id, submission in list(self._jobs.items()):
            if etas.get(task_id, math.inf) > left_s and not submission.has_slot and task_id not in parking:
                self._end(task_id)

    def hand_over_all(self, parking: Collection[str], broken: bool) -> None:
        """Hand over every job with the snapshot that is on the host; the loop plans nothing afterwards. Any thread.

        Args:
            parking: jobs whose snapshots are still on their way to the host.
            broken: the devices hang or are lost.
        """
        for task_id, submission in list(self._jobs.items()):
            if task_id in parking:
                submission.snapshot = None
            self.hand_over(submission, suspect=broken and submission.has_slot)
        self._jobs.clear()

    def end_all(self, reason: Exception) -> None:
        """End every job that is left; the loop plans nothing afterwards. Any thread."""
        for submission in list(self._jobs.values()):
            submission.settle(reason)

    def _not_finite(self, submission: Submission, device: int) -> None:
        """Try a job again whose image or state was not finite, or accuse it if it has failed alone."""
        reason = f"the model gave NaN or infinite values for this request on device {device}"
        is_foreign, submission.snapshot = submission.is_foreign, None  # the values may be in the snapshot
        if self._quarantine.is_alone(submission.job.task_id) and not is_foreign:
            self._accuse(submission, device, reason)
            return
        if not is_foreign:
            submission.failed_on[device] += 1
        self._try_alone(submission, reason)

    def _accuse(self, submission: Submission, device: int | None, reason: str) -> None:
        """Note that a job failed alone on a device, for `judge`."""
        assert device is not None
        self._policy.cancel(submission.job.task_id)
        self._accused.append((submission, device, reason))
        self.needs_verdict = True

    def _is_at_fault(self, submission: Submission) -> bool:
        """Return whether a job that has just failed alone is the cause, as far as another try could tell."""
        left = set(range(self._policy.num_devices)) - set(self._stats.lost_devices)
        failures = submission.failed_in_company + submission.failed_on.total()
        is_last_device = left <= submission.failed_on.keys()
        return submission.alone or len(submission.failed_on) > 1 or (is_last_device and failures > 1)

    def _try_alone(self, submission: Submission, reason: str) -> None:
        """Queue a job once more, for a try alone on a device on which it has not failed."""
        logger.error("task %s: %s; it is tried again, alone", submission.job.task_id, reason)
        self._quarantine.add(submission.job.task_id, submission.failed_on)
        self._try_again(submission)

    def _try_again(self, submission: Submission) -> None:
        """Queue a job once more, to resume from its snapshot or to start from the beginning."""
        self._stats.retried += 1
        self._policy.cancel(submission.job.task_id)
        submission.retry()
        self._queue(submission)

    def _queue(self, submission: Submission) -> None:
        """Give a job to the policy, to start or to resume from its snapshot."""
        job, steps = submission.job, submission.steps_done
        self._policy.add(job.task_id, job.lane, job.num_steps, submission.arrived_at, submission.terms, steps, job.load)

    def _end(self, task_id: str, end: Finished | Exception | None = None) -> None:
        """Remove a job and end it; without an `end`, hand it over."""
        submission = self._jobs.pop(task_id)
        self._quarantine.discard(task_id)
        self._policy.cancel(task_id)
        if end is None:
            self.hand_over(submission)
        else:
            submission.settle(end)
