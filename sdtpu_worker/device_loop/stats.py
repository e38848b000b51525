"""What a device loop has done so far, in numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.aggregator.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class LoopStats:
    """Counters since the loop started.

    Attributes:
        ticks: ticks that ended without a failure.
        images: images that jobs ended with.
        steps: denoising steps of devices, whatever was in their slots.
        job_steps: denoising steps that jobs took in ticks that ended without a failure; the excess over the steps of
            the images is repeated work.
        preemptions: times that a job was parked for another one.
        failures: device programs that failed.
        retried: times that a job went back to its start or its snapshot to be tried again.
        handed_over: jobs that the loop handed over to another worker.
        active_s: seconds with at least one job in the loop.
        device_busy_s: seconds that each device was busy.
        occupied_slot_s: seconds that slots held a job, summed over all slots.
        lost_devices: devices that get no job any more, in the order in which they were found.
    """

    ticks: int = 0
    images: int = 0
    steps: int = 0
    job_steps: int = 0
    preemptions: int = 0
    failures: int = 0
    retried: int = 0
    handed_over: int = 0
    active_s: float = 0.0
    device_busy_s: list[float] = field(default_factory=list)
    occupied_slot_s: float = 0.0
    lost_devices: list[int] = field(default_factory=list)

    def count(self, plan: Plan, elapsed_s: float, job_steps: int) -> None:
        """Count a tick that ended without a failure."""
        longest = max(plan.work_s, default=0.0)
        self.ticks += 1
        self.job_steps += job_steps
        self.preemptions += len(plan.parked)
        self.steps += sum(phase.steps for phases in plan.devices for phase in phases)
        self.occupied_slot_s += plan.occupied * elapsed_s
        for i, work_s in enumerate(plan.work_s):
            self.device_busy_s[i] += elapsed_s * work_s / max(longest, 1e-9)
        logger.debug(
            "tick of %.0f ms: %d slots in use, steps %s", 1000 * elapsed_s, plan.occupied,
            [sum(phase.steps for phase in phases) for phases in plan.devices],
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the counters as a JSON-compatible dict."""
        lists = {"device_busy_s": list(self.device_busy_s), "lost_devices": list(self.lost_devices)}
        return {**vars(self), **lists}
