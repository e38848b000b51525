"""The jobs in the device loop's hands: who waits, who has a slot, who is tried again, and that each ends exactly once.

Owned by the loop's thread; what may be called from any thread says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from sdtpu_worker.aggregator.jobs import EVERYBODY
from sdtpu_worker.aggregator.quarantine import Quarantine
from sdtpu_worker.device_loop.protocols import Policy
from sdtpu_worker.device_loop.stats import LoopStats
from sdtpu_worker.device_loop.submission import Finished, JobCancelled, JobHandedOver, JobOverdue, Submission
from sdtpu_worker.device_loop.ticks_in_flight import Flight
from sdtpu_worker.errors import GenerationFailed

logger = logging.getLogger(__name__)

_ETA_EVERY_S = 0.2
_MOST_CHARACTERS = 1000  # XLA's errors can bring pages of source locations


class JobTable:
    """All jobs by task id, with the policy that knows the same ones.

    Args:
        policy: who gets a slot.
        stats: where retries, pictures and jobs that were handed over are counted.
    """

    def __init__(self, policy: Policy, stats: LoopStats) -> None:
        self._policy, self._stats = policy, stats
        self._here: dict[str, Submission] = {}
        self._quarantine = Quarantine()
        self._admission = EVERYBODY
        self._etas_at = -math.inf

    def __len__(self) -> int:
        return len(self._here)

    def __getitem__(self, task_id: str) -> Submission:
        return self._here[task_id]

    def pick(self, task_ids: Iterable[str]) -> dict[str, Submission]:
        """Return those that are here, by task id."""
        return {task_id: self._here[task_id] for task_id in task_ids if task_id in self._here}

    def admit(self, submission: Submission, stops: bool) -> None:
        """Take a job in, or end it at once.

        Args:
            submission: of which the policy does not know yet.
            stops: the loop takes no more jobs in.
        """
        task_id = submission.job.task_id
        if task_id in self._here:  # a redelivery of what is running here: it gets the same result
            submission.follow(self._here[task_id])
            return
        if stops:
            self.hand_over(submission)
            return
        try:
            self._queue(submission)
        except (KeyError, ValueError) as exc:
            submission.settle(GenerationFailed(f"task {task_id} was not taken in: {exc}"))
            return
        self._here[task_id] = submission
        if submission.alone:
            self._quarantine.add(task_id)

    def cancel(self, task_id: str) -> None:
        """End a job that is not wanted any more; unknown ids are ignored."""
        if task_id in self._here:
            self._leave(task_id, JobCancelled(task_id))

    def drop_unwanted(self, now: float) -> None:
        """End the jobs whose time is over, and those that may not start any more."""
        for task_id, reason in self._policy.overdue(now):
            self._leave(task_id, JobOverdue(reason))
        for task_id, submission in list(self._here.items()):
            if submission.started_at is None and not submission.may_start():
                self._leave(task_id, JobCancelled(task_id))

    def tell_policy_who_may_start(self, nothing_in_flight: bool, now: float) -> None:
        """Let only the quarantined group have slots when it is its turn."""
        idle = nothing_in_flight and not self._policy.counts()["running"]
        admission = self._quarantine.admission(idle, now, others=len(self._here) > len(self._quarantine))
        if admission != self._admission:
            self._admission = admission
            self._policy.admit(admission)

    def seat(self, task_ids: Iterable[str], now: float) -> list[str]:
        """Take note that jobs are about to get a slot; return those that get their first one here.

        Those that a job which must be alone has made room for are returned again when it is their turn.
        """
        news = []
        for submission in self.pick(task_ids).values():
            submission.started_at = now if submission.started_at is None else submission.started_at
            submission.parked = False
            if not submission.announced:
                submission.announced = True
                news.append(submission.job.task_id)
        if news and self._here[news[0]].alone:
            for submission in self._here.values():  # parked ones are on the devices no more, but will be again
                submission.announced &= submission.job.task_id in news
        return news

    def deliver(self, flight: Flight, image: Any, now: float) -> None:
        """End a job with its picture; one that is not finite is tried again, once and alone."""
        submission = flight.jobs.get(image.task_id)
        if submission is None or self._here.get(image.task_id) is not submission or submission.started_at is None:
            return  # cancelled while its last tick was in flight
        if image.finite:
            self._stats.images += 1
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

    def blame(self, exc: Exception, parking: Collection[str]) -> None:
        """A device program failed and took the slots with it: try the jobs that had one again, or end who is at fault.

        Args:
            exc: what it raised.
            parking: jobs whose state was on its way to the host; other parked ones have it there and lose nothing.
        """
        suspects = [submission for submission in self._here.values() if submission.has_slot]
        at_fault = self._quarantine.failed([submission.job.task_id for submission in suspects])
        for submission in suspects:
            if submission.job.task_id == at_fault:
                cause = f"{type(exc).__name__}: {exc}"[:_MOST_CHARACTERS]
                self._leave(at_fault, GenerationFailed(f"the device program failed on this job alone: {cause}"))
            else:
                self._try_again(submission)
        for submission in self.pick(parking).values():
            if submission.parked and submission.usable_snapshot() is None:
                self._try_again(submission)

    def report(self, flight: Flight, now: float) -> None:
        """Let everybody know how far they are, from what was planned; nothing is read from the devices for it."""
        for task_id, steps in flight.plan.steps_done.items():
            submission = flight.jobs.get(task_id)
            if submission is not None and submission.started_at is not None and not submission.future.done():
                submission.report(steps, flight.tick.previews.get(task_id))
        is_new = any(submission.progress.eta_s is None for submission in self._here.values())
        if is_new or now - self._etas_at >= _ETA_EVERY_S:
            self._etas_at = now
            for task_id, eta_s in self._policy.etas_s(now).items():
                if submission := self._here.get(task_id):
                    submission.progress = replace(submission.progress, eta_s=eta_s)

    def hand_over(self, submission: Submission, suspect: bool = False) -> None:
        """End a job for another worker to go on with it. Any thread.

        Args:
            submission: of which the policy does not know any more.
            suspect: it was on the devices when they hung or were lost.
        """
        if submission.settle(JobHandedOver(submission.snapshot, suspect)):
            self._stats.handed_over += 1

    def hand_over_parked(self, task_ids: Iterable[str]) -> None:
        """Hand over jobs whose state has come from the devices."""
        for task_id in self.pick(task_ids):
            self._leave(task_id)

    def hand_over_waiting(self, left_s: float, now: float, parking: Collection[str]) -> None:
        """Hand over the jobs without a slot that cannot be done in time.

        Args:
            left_s: from when the devices are done with what is in flight.
            now: the time.
            parking: jobs whose state is still on its way to the host.
        """
        etas = self._policy.etas_s(now)
        for task_id, submission in list(self._here.items()):
            if etas.get(task_id, math.inf) > left_s and not submission.has_slot and task_id not in parking:
                self._leave(task_id)

    def hand_over_all(self, parking: Collection[str], broken: bool) -> None:
        """Hand over every job with what is on the host of it; nothing may be planned any more. Any thread.

        Args:
            parking: jobs whose state is still on its way to the host.
            broken: the devices hang or are lost.
        """
        for task_id, submission in list(self._here.items()):
            if task_id in parking:
                submission.snapshot = None
            self.hand_over(submission, suspect=broken and submission.has_slot)
        self._here.clear()

    def end_all(self, reason: Exception) -> None:
        """End every job that is still here; nothing may be planned any more. Any thread."""
        for submission in list(self._here.values()):
            submission.settle(reason)

    def _try_again(self, submission: Submission) -> None:
        """Let a job wait for a slot once more, with its last state off the devices, or from the start."""
        self._stats.retried += 1
        self._policy.cancel(submission.job.task_id)
        submission.start_over()
        self._queue(submission)

    def _queue(self, submission: Submission) -> None:
        """Give a job to the policy, to start or to go on from its state."""
        job, steps = submission.job, submission.steps_done
        self._policy.add(job.task_id, job.lane, job.num_inference_steps, submission.arrived_at, submission.terms, steps)

    def _leave(self, task_id: str, end: Finished | Exception | None = None) -> None:
        """End a job; without an end, hand it over."""
        submission = self._here.pop(task_id)
        self._quarantine.discard(task_id)
        self._policy.cancel(task_id)
        if end is None:
            self.hand_over(submission)
        else:
            submission.settle(end)
