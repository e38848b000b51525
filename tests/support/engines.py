"""Drive an engine without Celery: through the policy, or by plans written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdtpu_worker.aggregator.plan import Lane, Phase, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.engine_io import DecodedImage
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob, prepare_job
from sdtpu_worker.diffusion.samplers import NoiseSchedule


def generate_all(engine: Engine, requests: Sequence[GenerationRequest], steps_per_tick: int = 4) -> list[DecodedImage]:
    """Run requests through the policy, all at once; return the decoded images in the requests' order."""
    return generate(engine, [engine.prepare(str(i), request) for i, request in enumerate(requests)], steps_per_tick)


def prepare_with_scheduler(
    engine: Engine, config: Mapping[str, Any], name: str, request: GenerationRequest, pictures: Any = None
) -> PreparedJob:
    """Prepare a job as an engine whose checkpoint had this scheduler config would; its name is the task id."""
    is_xl = "text_encoder_2" in engine.checkpoint.params
    schedule = NoiseSchedule.from_config(dict(config), corrects_outdated=not is_xl)
    defaults = dataclasses.replace(engine.checkpoint.defaults, sampler=schedule.default_sampler)
    checkpoint = dataclasses.replace(engine.checkpoint, schedule=schedule, defaults=defaults)
    return prepare_job(checkpoint, engine.info.resolutions, name, request, None, pictures or {})


def run_alone(engine: Engine, job: PreparedJob, device: int, slot: int, portions: Iterable[int]) -> DecodedImage:
    """Run one job at a place of one's choosing, in portions of steps; other slots keep what they hold."""

    def tick(**phase: Any) -> list[DecodedImage]:
        return engine.execute(on_one_device(engine, job.lane, device, Phase(**phase)), {job.task_id: job}).wait()

    tick(insert=(slot, job.task_id))
    for steps in portions:
        tick(steps=steps)
    (image,) = tick(decode=(slot, job.task_id))
    return image


def on_one_device(engine: Engine, lane: Lane, device: int, *phases: Phase) -> Plan:
    """Return a plan for one device; the others have nothing to do."""
    return Plan(lane, tuple(phases if d == device else () for d in range(engine.info.num_devices)))
