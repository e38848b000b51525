"""Builds the plan for one tick of one lane: which job gets which slot, what each device does in each phase. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterator

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.aggregator.jobs import Eligibility, QueuedJob
from sdtpu_worker.aggregator.plan import Lane, Phase, Place, Plan

Slots = list[QueuedJob | None]


class PlanBuilder:
    """Builds a `Plan`: devices take jobs in the order in which they have a slot for them.

    Args:
        slots: the job in each slot, `[device][slot]`; the builder moves jobs in it as it plans.
        queue: the eligible jobs that wait, in order; a job that gets a slot leaves it, a preempted job joins it.
        cost: what work costs on a device.
        steps: denoising steps of a device that does nothing else in the tick.
        phases_per_tick: how many phases the compiled tick has.
        preview_every: steps between two previews of a job; 0 for none.
        now: the time in seconds.
        closed: devices that start and resume no job.

    Attributes:
        elapsed_s: seconds of work that every device has in the plan so far.
        displaced: jobs that lost their slot because they are not eligible; they do not join the queue.
        touched: by `(device, slot)`, the job that holds the slot, or held it last, in this tick.
        jobs: the jobs whose steps the plan counts: all in `touched`, less the parked ones.
    """

    def __init__(
        self,
        slots: list[Slots],
        queue: deque[QueuedJob],
        cost: Cost,
        steps: int,
        phases_per_tick: int,
        preview_every: int,
        now: float,
        closed: Collection[int] = (),
    ) -> None:
        self.slots, self.queue, self.cost, self.steps, self.now = slots, queue, cost, steps, now
        self.closed = closed
        self.phases_per_tick, self.preview_every = phases_per_tick, preview_every
        self.phases: list[list[Phase]] = [[] for _ in slots]
        self.elapsed_s = [0.0] * len(slots)
        self.parked: list[Place] = []
        self.displaced: list[QueuedJob] = []
        self.resumed: list[Place] = []
        self.touched = {(d, i): job for d, device in enumerate(slots) for i, job in enumerate(device) if job}
        self.jobs: list[QueuedJob] = list(self.touched.values())

    def preempt(self) -> None:
        """Let the first jobs of the queue take the slots of running jobs of lower priority, one on each device.

        A running job keeps its slot if it takes its last step in this tick, or if waiting has raised it to the level
        of the job that wants its slot.
        """
        candidates = deque(self.queue)
        by_weakness = sorted(
            ((d, i, job) for (d, i), job in self.touched.items() if job.remaining > self.steps),
            key=lambda place: (place[2].terms.priority, place[2].remaining),
            reverse=True,
        )
        for device, i, victim in by_weakness:
            if not candidates:
                return
            if device in self.closed:
                continue
            first = candidates[0]
            weaker = victim.terms.priority > first.terms.priority and victim.level(self.now) > first.level(self.now)
            if not weaker or any(place.device == device for place in self.parked):
                continue
            candidates.popleft()
            self._park(device, i, victim)
            self.queue.append(victim)  # behind the jobs that take the slots

    def displace(self, eligibility: Eligibility) -> None:
        """Park running jobs that are not eligible, one on each device; they become `displaced` and are not queued.

        A job that takes its last step in this tick keeps its slot.
        """
        for (device, i), job in self.touched.items():
            stays = job.task_id in eligibility or job.remaining <= self.steps
            if not stays and not any(place.device == device for place in self.parked):
                self._park(device, i, job)
                self.displaced.append(job)

    def fill(self) -> None:
        """Give every device its phases; the device that is free first, and has the fewest jobs, takes the next job."""
        heap = [(0.0, sum(job is not None for job in slots), d) for d, slots in enumerate(self.slots)]
        heapq.heapify(heap)
        while heap:
            _, _, device = heapq.heappop(heap)
            if self._add_phase(device) and len(self.phases[device]) < self.phases_per_tick:
                occupied = sum(job is not None for job in self.slots[device])
                heapq.heappush(heap, (self.elapsed_s[device], occupied, device))

    def to_plan(self, lane: Lane) -> Plan:
        """Return the plan."""
        return Plan(
            lane=lane,
            devices=tuple(map(tuple, self.phases)),
            parked=tuple(self.parked),
            resumed=tuple(self.resumed),
            previews=tuple(self._previews()),
            occupied=len(self.touched),
            steps_done={job.task_id: job.steps_done for job in self.jobs},
            work_s=tuple(self.elapsed_s),
        )

    def _park(self, device: int, i: int, job: QueuedJob) -> None:
        """Plan that a running job's state leaves its slot for the host."""
        self.parked.append(Place(job.task_id, device, i))
        self.slots[device][i] = None
        self.jobs.remove(job)
        job.parked, job.used_s = True, job.used_s + self.now - job.slot_since

    def _previews(self) -> Iterator[Place]:
        """Yield on each device one job that has passed another `preview_every`th step, the longest without one first.

        The other jobs of the device that have are due in the next ticks.
        """
        for device, slots in enumerate(self.slots):
            due = [
                (job.steps_done - job.previewed_at, -i, job) for i, job in enumerate(slots) if job and self._is_due(job)
            ]
            if due:
                _, i, job = max(due, key=lambda each: each[:2])
                job.previewed_at = job.steps_done
                yield Place(job.task_id, device, -i)

    def _is_due(self, job: QueuedJob) -> bool:
        """Return whether a job has passed another `preview_every`th step since its last preview."""
        every = self.preview_every
        return bool(every) and job.steps_done // every > job.previewed_at // every

    def _add_phase(self, device: int) -> bool:
        """Add one phase; return False if the device has nothing to do in the rest of the tick."""
        slots, phases, cost = self.slots[device], self.phases[device], self.cost
        if not phases:
            self._resume(device)
        elapsed_s = self.elapsed_s[device]
        budget_s = (self.steps + 0.25) * cost.step_s  # what other devices need at least, and a little
        decode = next(((i, job) for i, job in enumerate(slots) if job and not job.remaining), None)
        if phases and decode and elapsed_s + cost.decode_s > budget_s:
            return False
        if decode:
            slots[decode[0]] = None
            elapsed_s += cost.decode_s
        insert = None
        if self._takes_another(device):
            load = self.queue[0].load
            insert_s = cost.insert_of(load.pictures, load.adapters, load.windows)
            if not phases or elapsed_s + insert_s < budget_s:
                insert = slots.index(None), self.queue.popleft()
                self._give_slot(device, *insert)
                elapsed_s += insert_s
        controls = frozenset(control for job in slots if job for control in job.load.controls)
        windows = max((job.load.windows for job in slots if job), default=0)
        step_s = cost.step_of(controls, windows)
        steps = 0 if self._more_to_do_first(device) else self._steps(device, budget_s - elapsed_s, step_s)
        if not (phases or decode or insert or steps) and self.steps:
            steps = self._steps(device, step_s, step_s)  # one, though it takes longer than other devices work
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
                insert[1].load.pictures if insert else 0,
                controls if steps else frozenset(),
                insert[1].load.adapters if insert else 0,
                windows if steps else 0,
                insert[1].load.windows if insert else 0,
            )
        )
        self.elapsed_s[device] = elapsed_s + steps * step_s
        return True

    def _more_to_do_first(self, device: int) -> bool:
        """Return whether the next phase should decode or insert again before the slots advance."""
        is_done = any(job and not job.remaining for job in self.slots[device])
        return not self._is_last_phase(device) and (is_done or self._takes_another(device))

    def _takes_another(self, device: int) -> bool:
        """Return whether the first job of the queue may start on the device now, slots and order considered."""
        may_start = device not in self.closed and None in self.slots[device]
        return may_start and bool(self.queue) and not self.queue[0].parked

    def _steps(self, device: int, budget_s: float, step_s: float) -> int:
        """Return the steps of a phase: up to the first job's last step, so that the next phase decodes it.

        The last phase of a tick takes as many steps as fit.

        Args:
            device: in whose slots.
            budget_s: seconds that are left.
            step_s: seconds of a step.
        """
        left = [job.remaining for job in self.slots[device] if job and job.remaining]
        if not left:
            return 0
        return min(int(max(0.0, budget_s) / step_s), max(left) if self._is_last_phase(device) else min(left))

    def _is_last_phase(self, device: int) -> bool:
        return len(self.phases[device]) == self.phases_per_tick - 1

    def _resume(self, device: int) -> None:
        """Plan that the first job of the queue resumes in a free slot of the device, if the job is parked."""
        if self.queue and self.queue[0].parked and None in self.slots[device] and device not in self.closed:
            job = self.queue.popleft()
            slot = self.slots[device].index(None)
            self.resumed.append(Place(job.task_id, device, slot))
            self._give_slot(device, slot, job)
            job.parked = False

    def _give_slot(self, device: int, slot: int, job: QueuedJob) -> None:
        self.slots[device][slot] = job
        job.has_started, job.slot_since = True, self.now
        self.touched[device, slot] = job
        self.jobs.append(job)
