"""What `benchmarks/limit.py` measures its limit with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from benchmarks import limit
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.planning.simulation import LANE
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob

COSTS = TickCosts(8, Cost(0.03, 0.01, 0.05))  # eight devices that do not slow each other down
STEPS = (10, 20, 30, 50)


def test_the_bare_loop_of_the_limit_makes_every_picture_once_in_balanced_ticks():
    info = SimpleNamespace(resolutions=(LANE,), num_devices=8, phases_per_tick=2)
    shape: Any = SimpleNamespace(info=info, costs={LANE: COSTS})
    jobs: dict[str, Any] = {str(i): FakeJob(str(i), STEPS[i % 4], lane=LANE) for i in range(96)}
    engine, images, seconds = FakeEngine(), {}, 0.0
    for plan in limit.plan_ahead(shape, list(jobs.values()), 0.4):
        images |= {image.task_id: image.pixels for image in engine.execute(plan, jobs).wait()}
        seconds += COSTS.tick_s(plan)
    assert images == {task_id: job.num_steps for task_id, job in jobs.items()}
    ideal_s = sum(job.num_steps * 0.03 + 0.06 for job in jobs.values()) / 8
    assert ideal_s / seconds > 0.93
