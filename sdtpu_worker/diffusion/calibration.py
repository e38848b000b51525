"""What an engine shows when it really runs its programs at the start: what work costs, and how images look here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Lane, Phase, Place, Plan
from sdtpu_worker.diffusion import previews
from sdtpu_worker.diffusion.adapters import JobAdapters
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.engine_io import Calibration
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.preparation import ControlPicture, PreparedJob, plain_request
from sdtpu_worker.diffusion.reference_image import agree, draw_reference_image

_TASK_ID, _STEPS = "calibration", 4


def calibrate(engine: Engine, known: Mapping[Lane, TickCosts] | None = None) -> Calibration:
    """Run every program of an engine, and return what that showed, for `Engine.adopt`.

    The slots hold what the runs left in them until `adopt` empties them; nothing else may use the engine meanwhile.

    Args:
        engine: the engine.
        known: what work costs, by lane; None to measure it.
    """
    costs, reference_images, colours = {}, {}, {}
    lost: frozenset[int] = frozenset()
    lanes = engine.info.resolutions
    for lane in lanes:
        engine.restore(lane, 0, 0, engine.snapshot(lane, 0, 0))
        costs[lane] = _measure_costs(engine, lane) if known is None else known[lane]
        if known is not None and engine.checkpoint.adapters is not None:
            _adapters_s(engine, _job(engine, lane, _TASK_ID), count=1)  # a program that nothing below runs
        reference_images[lane], differing = agree(draw_reference_image(engine, lane, range(engine.info.num_devices)))
        lost |= differing
        if engine.has_previews:
            colours[lane] = _fit_colours(engine, lane)
    engine.check_safety(np.zeros((*lanes[0], 3), np.uint8))
    return Calibration(costs, reference_images, colours, lost)


def _measure_costs(engine: Engine, lane: Lane) -> TickCosts:
    """Measure an insert, a step and a decode on one device, and how much longer a step takes on several."""
    job = _job(engine, lane, _TASK_ID)
    insert, steps, decode = Phase(insert=(0, _TASK_ID)), Phase(steps=_STEPS), Phase(decode=(0, _TASK_ID))
    num_devices = engine.info.num_devices

    def seconds(busy: int, phase: Phase, job: PreparedJob = job) -> float:
        """Return the shorter of two runs."""
        plan = Plan(lane, ((phase,),) * busy + ((),) * (num_devices - busy))
        return min(_tick_s(engine, plan, job) for _ in range(2))

    for phase in (insert, steps, decode):
        seconds(1, phase)
    overhead_s = _empty_tick_s(engine, lane)
    insert_s, steps_s, decode_s = (max(1e-6, seconds(1, phase) - overhead_s) for phase in (insert, steps, decode))
    picture_s = 0.0
    if engine.checkpoint.family.picture_use is PictureUse.START:  # other models encode one in every insert, or none
        from_picture = replace(job, image=np.full((*lane, 3), 127, np.uint8), first_level=(0.5, 0.5))
        picture_s = max(0.0, seconds(1, insert, from_picture) - overhead_s - insert_s)
    control_s = []
    for number in range(len(engine.checkpoint.family.control_names)):
        picture = ControlPicture(number, np.zeros((*lane, 3), np.uint8), 1.0, 0, 2 * _STEPS)
        seconds(1, insert, replace(job, num_steps=2 * _STEPS, controls=(picture,)))
        control_s.append(max(0.0, seconds(1, steps) - overhead_s - steps_s) / _STEPS)
    adapter_s = 0.0
    if engine.checkpoint.adapters is not None:
        adapter_s = max(0.0, _adapters_s(engine, job) - overhead_s - insert_s)
    window_s, window_insert_s = 0.0, 0.0
    if (further := engine.checkpoint.prompt_windows - 1) > 0:
        long_job = _long_job(engine, lane)
        window_insert_s = max(0.0, seconds(1, insert, long_job) - overhead_s - insert_s) / further
        window_s = max(0.0, seconds(1, steps) - overhead_s - steps_s) / _STEPS / further
    slowdown = {
        busy: max(1.0, (seconds(busy, steps) - overhead_s) / steps_s)
        for busy in (2, num_devices // 2, num_devices)
        if 1 < busy <= num_devices
    }
    cost = Cost(steps_s / _STEPS, insert_s, decode_s, picture_s, tuple(control_s), adapter_s, window_s, window_insert_s)
    return TickCosts(num_devices, cost, slowdown, overhead_s)


def _long_job(engine: Engine, lane: Lane) -> PreparedJob:
    """Return a job whose prompt has as many windows as there may be, for as many steps as are measured."""
    request, pictures = plain_request(engine.checkpoint.family, lane, _TASK_ID, seed=0, steps=1)
    prompt = " BREAK ".join([_TASK_ID] * engine.checkpoint.prompt_windows)
    request = replace(request, prompt=prompt, prompt_syntax="weighted")
    return replace(engine.prepare(_TASK_ID, request, pictures), num_steps=2 * _STEPS)


def _adapters_s(engine: Engine, job: PreparedJob, count: int = 2) -> float:
    """Return the seconds of an insert whose LoRAs are not on the device yet, the shortest of a few."""
    assert engine.checkpoint.adapters is not None
    plan = Plan(job.lane, ((Phase(insert=(0, _TASK_ID)),), *[()] * (engine.info.num_devices - 1)))
    stack = engine.checkpoint.adapters.layout.zeros(leading=(1,))
    others = [JobAdapters(np.array([0, number], np.uint32), stack) for number in range(1 + count)]
    times = [_tick_s(engine, plan, replace(job, adapters=adapters)) for adapters in others]
    return min(times[1:])  # the first is not counted


def _tick_s(engine: Engine, plan: Plan, job: PreparedJob) -> float:
    """Return the seconds of one tick, from the call to its end."""
    started = time.monotonic()
    engine.execute(plan, {_TASK_ID: job}).wait()
    return time.monotonic() - started


def _empty_tick_s(engine: Engine, lane: Lane, count: int = 8) -> float:
    """Return the seconds from the end of a tick without work to the end of the next one, with two in flight."""
    nothing = Plan(lane, ((),) * engine.info.num_devices)
    started = time.monotonic()
    ticks = [engine.execute(nothing, {})]
    for _ in range(count):
        ticks.append(engine.execute(nothing, {}))
        ticks.pop(0).wait()
    ticks.pop().wait()
    return (time.monotonic() - started) / (count + 1)


def _fit_colours(engine: Engine, lane: Lane) -> np.ndarray:
    """Draw an image on every device, and fit the map from latents to colours; see `previews.fit_colours`."""
    places = [Place(str(i), i, 0) for i in range(engine.info.num_devices)]
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
    engine: Engine, lane: Lane, task_id: str, prompt: str = "calibration", seed: int = 0, steps: int = 1
) -> PreparedJob:
    request, pictures = plain_request(engine.checkpoint.family, lane, prompt, seed, steps)
    return engine.prepare(task_id, request, pictures)
