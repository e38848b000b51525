"""Run jobs through the policy and an engine without a worker: for notebooks, scripts and tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.engine_io import DecodedImage, Tick
from sdtpu_worker.diffusion.preparation import PreparedJob


def generate(engine: Engine, jobs: Sequence[PreparedJob], steps_per_tick: int = 8) -> list[DecodedImage]:
    """Run prepared jobs through the policy, all at once; return the images in the jobs' order.

    Args:
        engine: nothing else may use it meanwhile; it need not be calibrated.
        jobs: as `engine.prepare` made them, each with a task id of its own.
        steps_per_tick: denoising steps of a tick while no image is due.
    """
    info = engine.info
    costs = {lane: TickCosts(info.num_devices, Cost(1.0 / steps_per_tick)) for lane in info.resolutions}
    aggregator = Aggregator(costs, info.slots_per_device, info.phases_per_tick, tick_s=1.0)
    by_id = {job.task_id: job for job in jobs}
    for job in by_id.values():
        aggregator.add(job.task_id, job.lane, job.num_steps, now=0.0)
    images: dict[str, DecodedImage] = {}
    ticks: deque[Tick] = deque()
    while (plan := aggregator.plan(now=0.0)) or ticks:
        if plan:
            ticks.append(engine.execute(plan, by_id))
        if plan is None or len(ticks) == 2:
            images.update((image.task_id, image) for image in ticks.popleft().wait())
    return [images[job.task_id] for job in jobs]
