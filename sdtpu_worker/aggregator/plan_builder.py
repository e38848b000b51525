"""One tick of one lane in the making: which job goes where, and what every device does in each of its phases. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.aggregator.jobs import Admission, QueuedJob
from sdtpu_worker.aggregator.plan import Lane, Phase, Place, Plan

Slots = list[QueuedJob | None]


class TickMaker:
    """Makes a `Plan`: devices take jobs in the order in which they have a slot for them.

    Args:
        slots: who is where, `[device][slot]`; changed as the plan goes.
        queue: who waits, in order; those who get a slot leave it, those who lose theirs are added.
        cost: what work costs on a device.
        steps: how many steps a device takes that has nothing else to do.
        phases_per_tick: how many phases the compiled tick has.
        preview_every: steps between two previews of a job; 0 for none.
        now: the time.
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
    ) -> None:
        self.slots, self.queue, self.cost, self.steps, self.now = slots, queue, cost, steps, now
        self.phases_per_tick, self.preview_every = phases_per_tick, preview_every
        self.phases: list[list[Phase]] = [[] for _ in slots]
        self.elapsed_s = [0.0] * len(slots)
        self.parked: list[Place] = []
        self.set_aside: list[QueuedJob] = []
        self.resumed: list[Place] = []
        self.touched = {(d, i): job for d, device in enumerate(slots) for i, job in enumerate(device) if job}
        self.jobs: list[QueuedJob] = list(self.touched.values())
        self.previewed = {job.task_id: self._previews_due(job) for job in self.jobs}

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
            first = newcomers[0]
            weaker = victim.terms.priority > first.terms.priority and victim.level(self.now) > first.level(self.now)
            if not weaker or any(place.device == device for place in self.parked):
                continue
            newcomers.popleft()
            self._park(device, i, victim)
            self.queue.append(victim)  # behind those that it lost its slot to

    def make_room(self, admission: Admission) -> None:
        """Take jobs that are not admitted off their slots, one on each device; they are `set_aside`, not queued.

        A job that is done in this tick anyway is left alone.
        """
        for (device, i), job in self.touched.items():
            stays = job.task_id in admission or job.remaining <= self.steps
            if not stays and not any(place.device == device for place in self.parked):
                self._park(device, i, job)
                self.set_aside.append(job)

    def fill(self) -> None:
        """Give every device its phases; whoever is free first, and has the fewest jobs, takes the next job."""
        heap = [(0.0, sum(job is not None for job in slots), d) for d, slots in enumerate(self.slots)]
        heapq.heapify(heap)
        while heap:
            _, _, device = heapq.heappop(heap)
            if self._add_phase(device) and len(self.phases[device]) < self.phases_per_tick:
                occupied = sum(job is not None for job in self.slots[device])
                heapq.heappush(heap, (self.elapsed_s[device], occupied, device))

    def to_plan(self, lane: Lane) -> Plan:
        """Return what was made."""
        return Plan(
            lane=lane,
            devices=tuple(map(tuple, self.phases)),
            parked=tuple(self.parked),
            resumed=tuple(self.resumed),
            previews=tuple(self._previews()),
            occupied=len(self.touched),
            steps_done={job.task_id: job.num_steps - job.remaining for job in self.jobs},
            work_s=tuple(self.elapsed_s),
        )

    def _park(self, device: int, i: int, job: QueuedJob) -> None:
        """Plan that a running job's state comes from its slot to the host."""
        self.parked.append(Place(job.task_id, device, i))
        self.slots[device][i] = None
        self.jobs.remove(job)
        job.parked, job.used_s = True, job.used_s + self.now - job.slot_since

    def _previews_due(self, job: QueuedJob) -> int:
        return (job.num_steps - job.remaining) // self.preview_every if self.preview_every else 0

    def _previews(self) -> Iterator[Place]:
        """Yield one job of each device that came past another `preview_every` steps."""
        for device, slots in enumerate(self.slots):
            for i, job in enumerate(slots):
                if job and self._previews_due(job) > self.previewed.get(job.task_id, 0):
                    yield Place(job.task_id, device, i)
                    break

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
        if (
            self.queue
            and not self.queue[0].parked
            and None in slots
            and (not phases or elapsed_s + cost.insert_s < budget_s)
        ):
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
        if not left:
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

    def _seat(self, device: int, slot: int, job: QueuedJob) -> None:
        self.slots[device][slot] = job
        job.has_started, job.slot_since = True, self.now
        self.touched[device, slot] = job
        self.jobs.append(job)
