"""The policy: which job goes into which slot, how far every device goes, what is decoded. Pure: no clock, no
threads, no arrays; the time comes in as an argument.

Invariant: every job that was added leaves exactly once: decoded, cancelled or overdue. A slot holds at most one job.
No slot stays free while a job of its lane waits past one plan for it, and no job waits for ever behind others.

A lane is one resolution: its own compiled programs and its own slots on every device. Each plan is one tick of one
lane. Devices run their phases without asking the host, so the policy knows every slot's step from what it planned:
`plan` moves its own account on at once, and `update` only reports how long it took.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Lane, Outcome, Phase, Place, Plan
from sdtpu_worker.request import DEFAULT_PRIORITY

AGEING_S = 30.0
"""A job that waits goes up one priority in this time, so that nothing starves."""

_WORTH_WAITING = 0.95  # fewer devices at a time only for a gain that is not measurement noise


@dataclass(frozen=True)
class Terms:
    """What a job's client asked for besides the picture.

    Attributes:
        priority: lower goes first; only a difference in this number lets a job take another's slot.
        expires_at: when the job is not wanted any more unless it has a slot, on the clock of `plan(now)`.
        soft_time_limit_s, time_limit_s: how long it may hold a slot.
    """

    priority: int = DEFAULT_PRIORITY
    expires_at: float = math.inf
    soft_time_limit_s: float = math.inf
    time_limit_s: float = math.inf


class Overdue(Enum):
    """Why a job had to leave."""

    EXPIRED = "expired before it had a slot"
    SOFT_TIME_LIMIT = "soft time limit"
    TIME_LIMIT = "time limit"


@dataclass
class _Job:
    task_id: str
    num_steps: int
    terms: Terms
    number: int  # order of arrival
    arrived_at: float
    remaining: int
    has_started: bool = False
    parked: bool = False
    slot_since: float = 0.0
    used_s: float = 0.0  # in slots that it lost

    def level(self, now: float) -> int:
        """Return the priority, improved by the time since it arrived."""
        return math.floor(self.terms.priority - (now - self.arrived_at) / AGEING_S)

    def order(self, now: float) -> tuple[int, float, int]:
        return self.level(now), self.terms.expires_at, self.number


Slots = list[_Job | None]


@dataclass
class _LaneState:
    costs: TickCosts
    slots: list[Slots]  # [device][slot]
    waiting: dict[str, _Job] = field(default_factory=dict)
    credit_s: float = 0.0  # deficit round robin

    def running(self) -> Iterator[tuple[int, int, _Job]]:
        for device, slots in enumerate(self.slots):
            for i, job in enumerate(slots):
                if job is not None:
                    yield device, i, job

    def has_work(self) -> bool:
        return bool(self.waiting) or any(True for _ in self.running())


class Aggregator:
    """Plans ticks for single-prompt jobs; owned by the device loop's thread.

    Args:
        costs: what work costs, for every lane that has programs.
        slots_per_device: rows of one device's batch.
        phases_per_tick: how many phases the compiled tick has.
        tick_s: how long a tick should take, seconds; half of it while a slot is free, for whoever comes next.
        preemption: a job may take the slot of one of lower priority.
    """

    def __init__(
        self,
        costs: Mapping[Lane, TickCosts],
        slots_per_device: int,
        phases_per_tick: int,
        tick_s: float,
        preemption: bool = True,
    ) -> None:
        self.num_devices = next(iter(costs.values())).num_devices
        self.slots_per_device, self.phases_per_tick = slots_per_device, phases_per_tick
        self.tick_s, self.preemption = tick_s, preemption
        self._lanes = {
            lane: _LaneState(cost, [[None] * slots_per_device for _ in range(self.num_devices)])
            for lane, cost in costs.items()
        }
        self._turn = deque(costs)
        self._number = 0

    def add(
        self,
        task_id: str,
        lane: Lane,
        num_steps: int,
        now: float,
        terms: Terms | None = None,
        steps_done: int = 0,
    ) -> None:
        """Queue a job; one with `steps_done` comes with a state to go on from.

        Raises:
            KeyError: the lane has no programs.
            ValueError: the task is here already.
        """
        if any(task_id == job.task_id for job in self._jobs()):
            raise ValueError(f"task {task_id} is already here")
        self._number += 1
        self._lanes[lane].waiting[task_id] = _Job(
            task_id, num_steps, terms or Terms(), self._number, now, remaining=num_steps - steps_done,
            has_started=steps_done > 0, parked=steps_done > 0,
        )  # fmt: skip

    def cancel(self, task_id: str) -> bool:
        """Drop a job, waiting or running; its slot is free in the next plan. False if it is not here any more."""
        for state in self._lanes.values():
            if state.waiting.pop(task_id, None) is not None:
                return True
            for device, slot, job in state.running():
                if job.task_id == task_id:
                    state.slots[device][slot] = None
                    return True
        return False

    def overdue(self, now: float) -> list[tuple[str, Overdue]]:
        """Drop the jobs that expired before they had a slot, and those that held one for too long."""
        gone = [
            (job.task_id, Overdue.EXPIRED)
            for state in self._lanes.values()
            for job in state.waiting.values()
            if job.terms.expires_at <= now and not job.has_started
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

    def plan(self, now: float) -> Plan | None:
        """Return the next tick, or None when there is nothing to do.

        Lanes with work share the devices' seconds by deficit round robin.
        """
        for state in self._lanes.values():
            if not state.has_work():
                state.credit_s = 0.0
        if not any(state.has_work() for state in self._lanes.values()):
            return None
        while True:
            state = self._lanes[self._turn[0]]
            if not state.has_work():
                self._turn.rotate(-1)
            elif state.credit_s <= 0:
                state.credit_s += self.tick_s
                self._turn.rotate(-1)
            else:
                plan = self._plan_lane(self._turn[0], state, now)
                state.credit_s -= state.costs.tick_s(plan)
                return plan

    def update(self, outcome: Outcome) -> None:
        """Learn from a tick's duration what work costs."""
        self._lanes[outcome.plan.lane].costs.learn(outcome.plan, outcome.elapsed_s)

    def expected_s(self, plan: Plan) -> float:
        """Return how long a plan will take."""
        return self._lanes[plan.lane].costs.tick_s(plan)

    def etas_s(self, now: float) -> dict[str, float]:
        """Return for every job here the seconds until its picture is expected, if nobody else comes."""
        busy_lanes = sum(state.has_work() for state in self._lanes.values())
        etas: dict[str, float] = {}
        for state in self._lanes.values():
            running = sorted((job for *_, job in state.running()), key=lambda job: job.order(now))
            waiting = sorted(state.waiting.values(), key=lambda job: job.order(now))
            active = self._active_devices(state)
            free_at = [0.0] * max(1, active * self.slots_per_device)
            for job in running + waiting:
                start_s = heapq.heappop(free_at)
                work_s = _work_s(job, state.costs.cost) * state.costs.slowdown(active)
                etas[job.task_id] = start_s + busy_lanes * work_s
                heapq.heappush(free_at, etas[job.task_id])
        return etas

    def lowest_priority_running(self) -> int | None:
        """Return the largest priority number of the jobs that have a slot and could lose it."""
        numbers = [job.terms.priority for state in self._lanes.values() for *_, job in state.running() if job.remaining]
        return max(numbers, default=None)

    def counts(self) -> Mapping[str, int]:
        """Return how many jobs wait and how many have a slot."""
        return {
            "waiting": sum(len(state.waiting) for state in self._lanes.values()),
            "running": sum(1 for state in self._lanes.values() for _ in state.running()),
        }

    def _active_devices(self, state: _LaneState) -> int:
        """Return how many devices should denoise at a time to get the jobs here done soonest, on average.

        All that have work, unless they slow each other down by sharing something, as simulated devices share the
        cores of a CPU: running k at a time until n devices' work is done takes a job about slowdown(k) * (n / k + 1).
        With a batch or more waiting only the rate k / slowdown(k) counts.
        """
        jobs = len(state.waiting) + sum(1 for _ in state.running())
        devices_of_work = math.ceil(jobs / self.slots_per_device)
        most = min(self.num_devices, devices_of_work)
        overload = devices_of_work >= 2 * self.num_devices

        def mean_s(active: int) -> float:
            return state.costs.slowdown(active) * (devices_of_work / active + (not overload))

        best = min(range(most, 0, -1), key=mean_s, default=0)
        return best if best == most or mean_s(best) < _WORTH_WAITING * mean_s(most) else most

    def _jobs(self) -> Iterator[_Job]:
        for state in self._lanes.values():
            yield from state.waiting.values()
            yield from (job for *_, job in state.running())

    def _plan_lane(self, lane: Lane, state: _LaneState, now: float) -> Plan:
        queue = deque(sorted(state.waiting.values(), key=lambda job: job.order(now)))
        occupied = sum(1 for _ in state.running())
        num_slots = self.num_devices * self.slots_per_device
        active = self._active_devices(state)
        tick_s = self.tick_s if occupied + len(queue) > num_slots else self.tick_s / 2
        steps = max(1, round(tick_s / state.costs.step_s(active)))
        if any(not job.remaining for *_, job in state.running()):  # as long as a decode takes, the others go on
            steps = max(steps, round(state.costs.cost.decode_s / state.costs.cost.step_s))
        tick = _Tick(state.slots, queue, active, state.costs.cost, steps, self.phases_per_tick, now)
        if self.preemption and occupied == num_slots:
            tick.preempt()
        tick.fill()
        state.waiting = {job.task_id: job for job in queue}
        return tick.to_plan(lane)


class _Tick:
    """One tick of one lane in the making: devices take jobs in the order in which they have a slot for them."""

    def __init__(
        self,
        slots: list[Slots],
        queue: deque[_Job],
        active: int,
        cost: Cost,
        steps: int,
        phases_per_tick: int,
        now: float,
    ) -> None:
        self.slots, self.queue, self.cost, self.steps, self.now = slots, queue, cost, steps, now
        self.num_active = active
        self.active: set[int] = set()
        self.phases_per_tick = phases_per_tick
        self.phases: list[list[Phase]] = [[] for _ in slots]
        self.elapsed_s = [0.0] * len(slots)
        self.parked: list[Place] = []
        self.resumed: list[Place] = []
        self.touched = {(d, i): job for d, device in enumerate(slots) for i, job in enumerate(device) if job}
        self.jobs: list[_Job] = list(self.touched.values())

    def preempt(self) -> None:
        """Let the first of the queue take the slots of running jobs of lower priority, one on each device.

        A job that is done in this tick anyway is left alone, and so is one that has aged to the newcomer's level.
        """
        newcomers = deque(self.queue)
        by_weakness = sorted(
            ((d, i, job) for (d, i), job in self.touched.items() if job.remaining > self.steps),
            key=lambda place: (place[2].terms.priority, place[2].remaining),
            reverse=True,
        )
        for device, i, victim in by_weakness:
            if not newcomers:
                return
            first, now = newcomers[0], self.now
            weaker = victim.terms.priority > first.terms.priority and victim.level(now) > first.level(now)
            if not weaker or any(place.device == device for place in self.parked):
                continue
            newcomers.popleft()
            self.parked.append(Place(victim.task_id, device, i))
            self.slots[device][i] = None
            self.jobs.remove(victim)
            victim.parked, victim.used_s = True, victim.used_s + now - victim.slot_since
            self.queue.append(victim)  # behind those that it lost its slot to

    def fill(self) -> None:
        """Give every device its phases; whoever is free first, and has the fewest jobs, takes the next job."""
        by_oldest = sorted(
            (min(job.order(self.now) for job in slots if job), d) for d, slots in enumerate(self.slots) if any(slots)
        )
        self.active = {d for _, d in by_oldest[: self.num_active]}
        heap = [(0.0, sum(job is not None for job in slots), d) for d, slots in enumerate(self.slots)]
        heapq.heapify(heap)
        while heap:
            _, _, device = heapq.heappop(heap)
            if self._add_phase(device) and len(self.phases[device]) < self.phases_per_tick:
                occupied = sum(job is not None for job in self.slots[device])
                heapq.heappush(heap, (self.elapsed_s[device], occupied, device))

    def to_plan(self, lane: Lane) -> Plan:
        return Plan(
            lane=lane,
            devices=tuple(map(tuple, self.phases)),
            parked=tuple(self.parked),
            resumed=tuple(self.resumed),
            occupied=len(self.touched),
            steps_done={job.task_id: job.num_steps - job.remaining for job in self.jobs},
            work_s=tuple(self.elapsed_s),
        )

    def _add_phase(self, device: int) -> bool:
        """Add one phase; False when there was nothing to do in what is left of the tick."""
        slots, phases, cost = self.slots[device], self.phases[device], self.cost
        if not phases:
            self._resume(device)
        elapsed_s = self.elapsed_s[device]
        budget_s = (self.steps + 0.25) * cost.step_s  # what the others need at least, and a little
        decode = next(((i, job) for i, job in enumerate(slots) if job and not job.remaining), None)
        if phases and decode and elapsed_s + cost.decode_s > budget_s:
            return False
        if decode:
            slots[decode[0]] = None
            elapsed_s += cost.decode_s
        insert = None
        if self.queue and not self.queue[0].parked and None in slots and (not phases or elapsed_s < budget_s):
            insert = slots.index(None), self.queue.popleft()
            self._seat(device, *insert)
            elapsed_s += cost.insert_s
        steps = 0 if self._more_to_do_first(device) else self._steps(device, budget_s - elapsed_s)
        for job in slots:
            if job:
                job.remaining -= min(steps, job.remaining)
        if not (decode or insert or steps):
            return False
        phases.append(
            Phase(
                (decode[0], decode[1].task_id) if decode else None,
                (insert[0], insert[1].task_id) if insert else None,
                steps,
            )
        )
        self.elapsed_s[device] = elapsed_s + steps * cost.step_s
        return True

    def _more_to_do_first(self, device: int) -> bool:
        """Whether the next phase should decode or insert again before the slots go on."""
        slots = self.slots[device]
        takes_another = None in slots and self.queue and not self.queue[0].parked
        return not self._is_last_phase(device) and bool(
            takes_another or any(job and not job.remaining for job in slots)
        )

    def _steps(self, device: int, budget_s: float) -> int:
        """Go to the first job that gets done, for the next phase to decode it; in the last phase to the end."""
        left = [job.remaining for job in self.slots[device] if job and job.remaining]
        if not left or device not in self.active:
            return 0
        return min(int(max(0.0, budget_s) / self.cost.step_s), max(left) if self._is_last_phase(device) else min(left))

    def _is_last_phase(self, device: int) -> bool:
        return len(self.phases[device]) == self.phases_per_tick - 1

    def _resume(self, device: int) -> None:
        if self.queue and self.queue[0].parked and None in self.slots[device]:
            job = self.queue.popleft()
            slot = self.slots[device].index(None)
            self.resumed.append(Place(job.task_id, device, slot))
            self._seat(device, slot, job)
            job.parked = False

    def _seat(self, device: int, slot: int, job: _Job) -> None:
        self.slots[device][slot] = job
        job.has_started, job.slot_since = True, self.now
        self.touched[device, slot] = job
        self.jobs.append(job)
        if len(self.active) < self.num_active:
            self.active.add(device)


def _work_s(job: _Job, cost: Cost) -> float:
    return job.remaining * cost.step_s + cost.decode_s + (0.0 if job.has_started else cost.insert_s)
