"""What every tick adds to the figures; called in the device loop's thread, so it costs microseconds."""

from __future__ import annotations

from collections.abc import Mapping

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import Lane, Plan
from sdtpu_worker.operations.figures import Figures


class TickMeter:
    """Told of every tick that ended without a failure.

    Devices do not say when a part of a tick ends. So a step, an insert and a decode get the share of the measured time
    that they have of the expected one.

    Args:
        figures: where the tick is counted.
        costs: what work is expected to cost, by lane.
        num_slots: slots of one lane over all devices.
    """

    def __init__(self, figures: Figures, costs: Mapping[Lane, TickCosts], num_slots: int) -> None:
        self._figures, self._costs, self._num_slots = figures, costs, num_slots
        names = ("tick_seconds", "tick_occupancy_ratio", "step_seconds", "insert_seconds", "decode_seconds")
        self._tick, self._occupancy, self._step, self._insert, self._decode = (
            figures.histograms[f"sdtpu_{name}"] for name in names
        )

    def __call__(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Count a tick.

        Args:
            plan: what the devices did.
            started_at, ended_at: seconds on the loop's clock.
        """
        elapsed_s = ended_at - started_at
        self._tick.observe(elapsed_s)
        self._occupancy.observe(plan.occupied / self._num_slots)
        if plan.parked:
            self._figures.count("sdtpu_requests_total", "preempted", "", by=len(plan.parked))
        if plan.resumed:
            self._figures.count("sdtpu_requests_total", "resumed", "", by=len(plan.resumed))
        longest_s = max(plan.work_s, default=0.0)
        if longest_s <= 0:
            return
        scale, cost = elapsed_s / longest_s, self._costs[plan.lane].cost
        step_s = 0.0
        for phases in plan.devices:
            for phase in phases:
                if phase.steps:
                    step_s = max(step_s, cost.step_of(phase.controls, phase.windows))
                if phase.insert is not None:
                    insert_s = cost.insert_of(phase.pictures, phase.adapters, phase.windows_in)
                    self._insert.observe(insert_s * scale)
                if phase.decode is not None:
                    self._decode.observe(cost.decode_s * scale)
        if step_s:
            self._step.observe(step_s * scale)
