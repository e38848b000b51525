"""Fixed full-trajectory batches: the policy that step-level batching is measured against.

A batch forms from what waits when the devices are free (there is no linger time), runs to its end, and nobody joins or
leaves before: what serving frameworks call dynamic batching. `bucketed` puts only jobs of equal step counts together,
the bucket with the oldest job first; `mixed` takes the oldest jobs whatever their steps, and waits for the longest.
`fixed_batches.py` is the worker that runs it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.jobs import EVERY_JOB, NO_LOAD, Eligibility, Load, Overdue, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Phase, Place, Plan

BATCHES_HELD = 8
"""How many batches of jobs its worker holds: more than ours, so that buckets fill; to its advantage."""


class FixedBatches:
    """A policy like `sdtpu_worker.aggregator.policy.Aggregator`, for one lane, without priorities and limits."""

    def __init__(
        self, costs: Mapping[Lane, TickCosts], slots_per_device: int, phases_per_tick: int, bucketed: bool = True
    ) -> None:
        ((self.lane, self.costs),) = costs.items()
        self.num_devices, self.slots_per_device = self.costs.num_devices, slots_per_device
        self.phases_per_tick, self.bucketed = phases_per_tick, bucketed
        self._waiting: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._eligibility = EVERY_JOB
        self._ticks: deque[Plan] = deque()

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
        if lane != self.lane or task_id in self._waiting or task_id in self._running:
            raise ValueError(f"task {task_id} cannot be taken in")
        self._waiting[task_id] = num_steps

    def cancel(self, task_id: str) -> bool:
        return self._waiting.pop(task_id, None) is not None

    def overdue(self, now: float) -> list[tuple[str, Overdue]]:
        return []

    def set_eligible(self, eligibility: Eligibility) -> None:
        self._eligibility = eligibility

    def exclude(self, device: int) -> list[str]:
        raise ValueError(f"fixed batches need every device, also device {device}")

    def plan(self, now: float, most_s: float = math.inf) -> Plan | None:
        """Return the next tick of the batch, however long it takes: a batch that has begun runs to its end."""
        if not self._ticks:
            self._running = {}
            if not self._eligible():
                return None
            self._start_batch()
        return self._ticks.popleft()

    def update(self, outcome: Outcome) -> None:
        self.costs.learn(outcome.plan, outcome.elapsed_s)

    def expected_s(self, plan: Plan) -> float:
        return self.costs.tick_s(plan)

    def etas_s(self, now: float) -> dict[str, float]:
        return {}

    def lowest_priority_running(self) -> int | None:
        return None

    def places(self) -> dict[Lane, list[Place]]:
        running = list(self._running) if self._ticks else []
        num_devices = self.num_devices
        return {self.lane: [Place(task, i % num_devices, i // num_devices) for i, task in enumerate(running)]}

    def counts(self) -> Mapping[str, int]:
        return {"waiting": len(self._waiting), "running": len(self._running) if self._ticks else 0}

    def _eligible(self) -> dict[str, int]:
        return {task: steps for task, steps in self._waiting.items() if task in self._eligibility}

    def _start_batch(self) -> None:
        waiting = self._eligible()
        oldest_steps = next(iter(waiting.values()))
        chosen = [task for task, steps in waiting.items() if not self.bucketed or steps == oldest_steps]
        chosen = chosen[: self.num_devices * self.slots_per_device]
        self._running = {task: self._waiting.pop(task) for task in chosen}
        devices = [self._phases(chosen[device :: self.num_devices]) for device in range(self.num_devices)]
        cost = self.costs.cost
        for start in range(0, max(map(len, devices)), self.phases_per_tick):
            part = tuple(tuple(phases[start : start + self.phases_per_tick]) for phases in devices)
            decoded = [phase.decode[1] for phases in part for phase in phases if phase.decode]
            steps_done = {task: self._running[task] for task in decoded}
            self._ticks.append(
                Plan(self.lane, part, occupied=len(chosen), steps_done=steps_done, work_s=tuple(map(cost.of, part)))
            )

    def _phases(self, tasks: list[str]) -> list[Phase]:
        """Insert all of a device's jobs, go to the end of the longest, decode them all."""
        if not tasks:
            return []
        inserts = [Phase(insert=(slot, task)) for slot, task in enumerate(tasks)]
        longest = max(self._running[task] for task in tasks)
        inserts[-1] = Phase(insert=inserts[-1].insert, steps=longest)
        return inserts + [Phase(decode=(slot, task)) for slot, task in enumerate(tasks)]
