"""What an engine learns from really running its programs at the start: what work costs, and how pictures look here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Lane, Phase, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion import previews
from sdtpu_worker.diffusion.engine_io import PreparedJob

if TYPE_CHECKING:
    from sdtpu_worker.diffusion.engine import Engine

_TASK_ID, _STEPS = "warm-up", 4


def measure_costs(engine: Engine, lane: Lane) -> TickCosts:
    """Measure what inserting, a step and decoding cost on one device, and how much more so when others are busy."""
    job = _job(engine, lane, _TASK_ID)
    insert, steps, decode = Phase(insert=(0, _TASK_ID)), Phase(steps=_STEPS), Phase(decode=(0, _TASK_ID))

    def seconds(busy: int, phase: Phase) -> float:
        """Return the shorter of two runs."""
        plan = Plan(lane, ((phase,),) * busy + ((),) * (engine.num_devices - busy))
        times = []
        for _ in range(2):
            started = time.monotonic()
            engine.execute(plan, {_TASK_ID: job}).wait()
            times.append(time.monotonic() - started)
        return min(times)

    for phase in (insert, steps, decode):
        seconds(1, phase)
    overhead_s = _empty_tick_s(engine, lane)
    insert_s, steps_s, decode_s = (max(1e-6, seconds(1, phase) - overhead_s) for phase in (insert, steps, decode))
    slowdown = {
        busy: max(1.0, (seconds(busy, steps) - overhead_s) / steps_s)
        for busy in (2, engine.num_devices // 2, engine.num_devices)
        if 1 < busy <= engine.num_devices
    }
    return TickCosts(engine.num_devices, Cost(steps_s / _STEPS, insert_s, decode_s), slowdown, overhead_s)


def draw_proof(engine: Engine, lane: Lane) -> list[np.ndarray]:
    """Return the pixels of a picture of one step that every device draws, `(height, width, 3) uint8` each."""
    job = _job(engine, lane, "proof")
    phases = Phase(insert=(0, "proof"), steps=job.num_inference_steps), Phase(decode=(0, "proof"))
    images = engine.execute(Plan(lane, (phases,) * engine.num_devices), {"proof": job}).wait()
    return [image.pixels for image in images]


def fit_colours(engine: Engine, lane: Lane) -> np.ndarray:
    """Draw a picture on every device, to learn what the latents' channels look like; see `previews.fit_colours`."""
    places = [Place(str(i), i, 0) for i in range(engine.num_devices)]
    jobs = {}
    for p in places:
        prompt = previews.PROMPTS[p.device % len(previews.PROMPTS)]
        jobs[p.task_id] = _job(engine, lane, p.task_id, prompt, seed=p.device, steps=previews.STEPS)
    engine.execute(Plan(lane, tuple((Phase(insert=(0, p.task_id), steps=previews.STEPS),) for p in places)), jobs)
    latents = [engine.snapshot(lane, p.device, p.slot).state.latents[0] for p in places]
    images = engine.execute(Plan(lane, tuple((Phase(decode=(0, p.task_id)),) for p in places)), jobs).wait()
    pixels = [image.pixels for image in sorted(images, key=lambda image: image.device)]
    return previews.fit_colours(np.stack(latents), np.stack(pixels))


def _job(
    engine: Engine, lane: Lane, task_id: str, prompt: str = "warm-up", seed: int = 0, steps: int = 1
) -> PreparedJob:
    height, width = lane
    request = GenerationRequest(prompt, seed=seed, num_inference_steps=steps, height=height, width=width)
    return engine.prepare(task_id, request)


def _empty_tick_s(engine: Engine, lane: Lane, count: int = 8) -> float:
    """Return the seconds that a tick takes from the next one, two being in flight."""
    nothing = Plan(lane, ((),) * engine.num_devices)
    started = time.monotonic()
    ticks = [engine.execute(nothing, {})]
    for _ in range(count):
        ticks.append(engine.execute(nothing, {}))
        ticks.pop(0).wait()
    ticks.pop().wait()
    return (time.monotonic() - started) / (count + 1)
