"""The policy: it decides which job gets which slot, how many steps every device takes and which images are decoded.

Pure: no clock, no threads, no arrays; the time comes in as an argument.

Invariant: every job that was added leaves exactly once: decoded, cancelled or overdue. A slot holds at most one job.
An eligible job gets a free slot of its lane in the next plan, and no eligible job waits for ever behind other jobs.
No plan has anything to do for an excluded device.

A lane is one resolution: it has its own compiled programs and its own slots on every device. Each plan is one tick of
one lane. Devices run their phases without asking the host, so the policy knows every slot's step from what it planned:
`plan` counts the planned steps as taken at once, and `update` only says how long the tick took.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import EVERY_JOB, NO_LOAD, Eligibility, Load, Overdue, QueuedJob, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Place, Plan
from sdtpu_worker.aggregator.plan_builder import PlanBuilder, Slots


@dataclass
class _LaneState:
    """One lane's jobs.

    Attributes:
        slots: the job in each slot, `[device][slot]`.
        waiting: jobs without a slot, by task id.
        credit_s: device seconds that the lane may still use before it is another lane's turn (deficit round robin).
    """

    costs: TickCosts
    slots: list[Slots]
    waiting: dict[str, QueuedJob] = field(default_factory=dict)
    credit_s: float = 0.0

    def running(self) -> Iterator[tuple[int, int, QueuedJob]]:
        """Yield `(device, slot, job)` of every job that has a slot."""
        for device, slots in enumerate(self.slots):
            for i, job in enumerate(slots):
                if job is not None:
                    yield device, i, job

    def has_job(self, task_id: str) -> bool:
        """Return whether the job waits or has a slot."""
        return task_id in self.waiting or any(job.task_id == task_id for *_, job in self.running())

    def has_work(self, eligibility: Eligibility = EVERY_JOB) -> bool:
        """Return whether an eligible job waits or any job has a slot."""
        return any(task_id in eligibility for task_id in self.waiting) or any(True for _ in self.running())


def _step_s(cost: Cost, slots: Slots) -> float:
    """Return the seconds of a step of a device's jobs."""
    loads = [job.load for job in slots if job is not None]
    controls = {control for load in loads for control in load.controls}
    return cost.step_of(controls, max((load.windows for load in loads), default=0))


class Aggregator:
    """Plans ticks for single-prompt jobs; owned by the device loop's thread.

    Args:
        costs: what work costs, for every lane that has programs; `update` corrects them.
        slots_per_device: rows of one device's batch.
        phases_per_tick: how many phases the compiled tick has.
        tick_s: how long a tick should take, in seconds; half of it while a slot is free for a job that comes next.
        preemption: a job may take the slot of a job of lower priority.
        preview_every: steps between two previews of a job; 0 for none.
    """

    def __init__(
        self,
        costs: Mapping[Lane, TickCosts],
        slots_per_device: int,
        phases_per_tick: int,
        tick_s: float,
        preemption: bool = True,
        preview_every: int = 0,
    ) -> None:
        self.num_devices = next(iter(costs.values())).num_devices
        self.slots_per_device, self.phases_per_tick = slots_per_device, phases_per_tick
        self.tick_s, self.preemption, self.preview_every = tick_s, preemption, preview_every
        self._lanes = {
            lane: _LaneState(cost, [[None] * slots_per_device for _ in range(self.num_devices)])
            for lane, cost in costs.items()
        }
        self._turn = deque(costs)
        self._number = 0
        self._eligibility = EVERY_JOB
        self._excluded: frozenset[int] = frozenset()

    def add(
        self,
        task_id: str,
        lane: Lane,
        num_steps: int,
        now: float,
        terms: Terms | None = None,
        steps_done: int = 0,
        load: Load = NO_LOAD,
    ) -> None:
        """Queue a job; a job with `steps_done` comes with a snapshot and resumes from it.

        Raises:
            KeyError: the lane has no programs.
            ValueError: the policy has this task already, or the job has done more steps than it has.
        """
        if not 0 <= steps_done <= num_steps:
            raise ValueError(f"task {task_id} cannot have done {steps_done} of its {num_steps} steps")
        if any(state.has_job(task_id) for state in self._lanes.values()):
            raise ValueError(f"task {task_id} was added already: a task id may be added again once its job has ended")
        self._number += 1
        self._lanes[lane].waiting[task_id] = QueuedJob(
            task_id, num_steps, terms or Terms(), self._number, now, remaining=num_steps - steps_done,
            has_started=steps_done > 0, parked=steps_done > 0, load=load, previewed_at=steps_done,
        )  # fmt: skip

    def cancel(self, task_id: str) -> bool:
        """Drop a waiting or running job, and free its slot; return False if the policy does not have the job."""
        for state in self._lanes.values():
            if state.waiting.pop(task_id, None) is not None:
                return True
            for device, slot, job in state.running():
                if job.task_id == task_id:
                    state.slots[device][slot] = None
                    return True
        return False

    def overdue(self, now: float) -> list[tuple[str, Overdue]]:
        """Drop and return the jobs that expired before they had a slot, and the jobs that held a slot for too long."""
        gone = [
            (job.task_id, Overdue.EXPIRED)
            for state in self._lanes.values()
            for job in state.waiting.values()
            if job.terms.may_expire and job.terms.expires_at <= now and not job.has_started
        ]
        for state in self._lanes.values():
            for _, _, job in state.running():
                held_s, terms = job.used_s + now - job.slot_since, job.terms
                if held_s >= min(terms.soft_time_limit_s, terms.time_limit_s):
                    soft = terms.soft_time_limit_s < terms.time_limit_s
                    gone.append((job.task_id, Overdue.SOFT_TIME_LIMIT if soft else Overdue.TIME_LIMIT))
        for task_id, _ in gone:
            self.cancel(task_id)
        return gone

    def set_eligible(self, eligibility: Eligibility) -> None:
        """Give slots only to eligible jobs from now on, whatever the order of the queue.

        Running jobs that are not eligible are parked, one on each device in a tick, and resume when they are eligible
        again.
        """
        self._eligibility = eligibility

    def exclude(self, device: int) -> list[str]:
        """Give a device nothing to do from now on.

        Args:
            device: its number.

        Returns:
            The jobs that had a slot there: the policy has dropped them, as `cancel` does.

        Raises:
            ValueError: there would be no device left.
        """
        excluded = self._excluded | {device}
        if len(excluded) == self.num_devices:
            raise ValueError(f"device {device} cannot be excluded: it is the last one that draws images")
        self._excluded = excluded
        dropped = [job.task_id for state in self._lanes.values() for d, _, job in state.running() if d == device]
        for task_id in dropped:
            self.cancel(task_id)
        return dropped

    def plan(self, now: float, most_s: float = math.inf) -> Plan | None:
        """Return the plan for the next tick, or None when there is nothing to do.

        Lanes with work share the devices' seconds by deficit round robin.

        Args:
            now: the time in seconds.
            most_s: no step and no decode is planned that is expected to end later than this after the tick's start.
        """
        for state in self._lanes.values():
            if not state.has_work(self._eligibility):
                state.credit_s = 0.0
        fit = {
            lane: self._tick_steps(state, most_s)
            for lane, state in self._lanes.items()
            if state.has_work(self._eligibility)
        }
        if not any(fit.values()):
            return None
        while True:
            lane = self._turn[0]
            state = self._lanes[lane]
            if not fit.get(lane):
                self._turn.rotate(-1)
            elif state.credit_s <= 0:
                state.credit_s += self.tick_s
                self._turn.rotate(-1)
            else:
                plan = self._plan_lane(lane, state, fit[lane], now)
                state.credit_s -= state.costs.tick_s(plan)
                return plan

    def update(self, outcome: Outcome) -> None:
        """Correct the costs of a lane by how long a tick of it took."""
        self._lanes[outcome.plan.lane].costs.learn(outcome.plan, outcome.elapsed_s)

    def expected_s(self, plan: Plan) -> float:
        """Return the seconds that a plan is expected to take."""
        return self._lanes[plan.lane].costs.tick_s(plan)

    def etas_s(self, now: float) -> dict[str, float]:
        """Return by task id the seconds until a job's image is expected, if no other job comes."""
        busy_lanes = sum(state.has_work() for state in self._lanes.values())
        etas: dict[str, float] = {}
        for state in self._lanes.values():
            running = sorted((job for *_, job in state.running()), key=lambda job: job.order(now))
            waiting = sorted(state.waiting.values(), key=lambda job: job.order(now))
            free_at = [0.0] * self._num_slots
            slowdown = state.costs.slowdown(self._busy_devices(state))
            for job in running + waiting:
                start_s = heapq.heappop(free_at)
                etas[job.task_id] = start_s + busy_lanes * slowdown * job.work_s(state.costs.cost)
                heapq.heappush(free_at, etas[job.task_id])
        return etas

    def lowest_priority_running(self) -> int | None:
        """Return the largest priority number of the jobs that have a slot and steps to take; None if there are none."""
        numbers = [job.terms.priority for state in self._lanes.values() for *_, job in state.running() if job.remaining]
        return max(numbers, default=None)

    def places(self) -> dict[Lane, list[Place]]:
        """Return where every running job is, by lane."""
        return {
            lane: [Place(job.task_id, device, slot) for device, slot, job in state.running()]
            for lane, state in self._lanes.items()
        }

    def counts(self) -> Mapping[str, int]:
        """Return how many jobs wait and how many have a slot."""
        return {
            "waiting": sum(len(state.waiting) for state in self._lanes.values()),
            "running": sum(1 for state in self._lanes.values() for _ in state.running()),
        }

    def _busy_devices(self, state: _LaneState) -> int:
        """Return how many devices a lane's jobs keep busy: they spread over all devices before two share one."""
        return min(self.num_devices - len(self._excluded), len(state.waiting) + sum(1 for _ in state.running()))

    @property
    def _num_slots(self) -> int:
        """Slots of a lane on the devices that are not excluded."""
        return (self.num_devices - len(self._excluded)) * self.slots_per_device

    def _closed(self) -> frozenset[int]:
        """Return the devices that get no job: the excluded ones, and those to avoid if others are left."""
        closed = self._excluded | self._eligibility.avoid
        return closed if any(device not in closed for device in range(self.num_devices)) else self._excluded

    def _plan_lane(self, lane: Lane, state: _LaneState, steps: int, now: float) -> Plan:
        queue = deque(sorted(self._eligible(state), key=lambda job: job.order(now)))
        queued = {job.task_id for job in queue}
        ineligible = [job for job in state.waiting.values() if job.task_id not in queued]
        occupied = sum(1 for _ in state.running())
        builder = PlanBuilder(
            state.slots, queue, state.costs.cost, steps, self.phases_per_tick, self.preview_every, now, self._closed()
        )
        builder.displace(self._eligibility)
        if not builder.parked and self.preemption and occupied == self._num_slots:
            builder.preempt()
        builder.fill()
        state.waiting = {job.task_id: job for job in (*ineligible, *builder.displaced, *queue)}
        return builder.to_plan(lane)

    def _eligible(self, state: _LaneState) -> list[QueuedJob]:
        return [job for job in state.waiting.values() if job.task_id in self._eligibility]

    def _tick_steps(self, state: _LaneState, most_s: float) -> int:
        """Return how many steps a device that only denoises takes in the next tick; 0 if none fits in `most_s`.

        A tick lasts about `tick_s`: half of it while a slot is free for a job that comes next, twice as long when
        another whole batch waits anyway. Images leave the devices when a tick ends, so the tick is stretched or cut
        to end with the next decode.
        """
        jobs = len(self._eligible(state)) + sum(1 for _ in state.running())
        load = jobs / self._num_slots
        tick_s = self.tick_s * (0.5 if load <= 1 else 1 if load < 2 else 2)
        cost, busy = state.costs.cost, self._busy_devices(state)
        step_s = state.costs.slowdown(busy) * max(_step_s(cost, slots) for slots in state.slots)
        steps = max(1, round(tick_s / step_s))
        decode_steps = math.ceil(cost.decode_s / cost.step_s)
        most = math.inf if math.isinf(most_s) else max(0, int((most_s - state.costs.overhead_s) / step_s))
        ends = [job.remaining + decode_steps for *_, job in state.running()]
        if decode_steps in ends:  # a decode is due, however long it takes: other devices denoise meanwhile
            return max(int(min(steps, most)), decode_steps) if decode_steps <= most else 0
        return int(min(most, min((end for end in ends if steps <= 2 * end <= 3 * steps), default=steps)))
