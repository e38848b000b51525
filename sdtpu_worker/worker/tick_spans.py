"""What every tick adds to the traces; called in the device loop's thread, and costs nothing while no job is traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Lane, Phase, Plan
from sdtpu_worker.operations.tracing import Parts, Tracing


class TickSpans:
    """Told of every tick that ended without a failure.

    As in the timeline (`sdtpu_trace`), the parts of a tick are shares of the measured time, as they are expected to
    cost.

    Args:
        tracing: where spans go.
        costs: what work is expected to cost, by lane.
        num_slots: slots of one lane over all devices.
    """

    def __init__(self, tracing: Tracing, costs: Mapping[Lane, TickCosts], num_slots: int) -> None:
        self._tracing, self._costs, self._num_slots = tracing, costs, num_slots

    def __call__(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Tell of a tick, if a job is traced.

        Args:
            plan: what the devices did.
            started_at, ended_at: seconds on the loop's clock.
        """
        if not self._tracing.is_following:
            return
        longest_s = max(plan.work_s, default=0.0)
        scale = (ended_at - started_at) / longest_s if longest_s > 0 else 0.0
        jobs = {task_id: Parts(steps_done=steps) for task_id, steps in plan.steps_done.items()}
        for phases in plan.devices:
            for task_id, name, began_at, done_at in _parts(phases, self._costs[plan.lane].cost, started_at, scale):
                part: Any = {name: (began_at, done_at)}
                jobs[task_id] = replace(jobs.get(task_id, Parts()), **part)
        height, width = plan.lane
        facts = {
            "sdtpu.size": f"{height}x{width}",
            "sdtpu.slots": self._num_slots,
            "sdtpu.slots_busy": plan.occupied,
            "messaging.batch.message_count": len(jobs),
        }
        self._tracing.tick(started_at, ended_at, jobs, facts)


def _parts(
    phases: tuple[Phase, ...], cost: Cost, started_at: float, scale: float
) -> Iterator[tuple[str, str, float, float]]:
    """Yield `(task id, insert or decode, start, end)` of what one device did for jobs in a tick."""
    at = started_at
    for phase in phases:
        insert_s = cost.insert_of(phase.pictures, phase.adapters, phase.windows_in)
        for name, part, seconds in (("decode", phase.decode, cost.decode_s), ("insert", phase.insert, insert_s)):
            if part is not None:
                yield part[1], name, at, at + seconds * scale
                at += seconds * scale
        at += phase.steps * cost.step_of(phase.controls, phase.windows) * scale
