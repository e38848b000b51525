"""What an engine says of itself: to the worker, and through it to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

import jax

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.served import MAX_NAMES, Served
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.compilation import CompiledPrograms
from sdtpu_worker.diffusion.slots import Geometry


def describe_engine(
    checkpoint: Checkpoint,
    devices: Sequence[jax.Device],
    geometries: Mapping[Lane, Geometry],
    programs: CompiledPrograms,
) -> EngineInfo:
    """Return what a worker reads of an engine.

    Args:
        checkpoint: the model.
        devices: those of the engine.
        geometries: the slots of each lane.
        programs: the engine's, compiled.
    """
    geometry = next(iter(geometries.values()))
    return EngineInfo(
        model=checkpoint.name,
        default_sampler=checkpoint.defaults.sampler,
        dtype=checkpoint.dtype.__name__,
        platform=devices[0].platform,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        slots_per_device=geometry.slots_per_device,
        phases_per_tick=geometry.phases,
        resolutions=tuple(geometries),
        load_s=programs.load_s,
        trace_s=programs.trace_s,
        compile_s=programs.compile_s,
        kept_programs=programs.kept,
        cache_hits=programs.cache_hits,
        cache_misses=programs.cache_misses,
        default_steps=checkpoint.defaults.num_inference_steps,
        loras=tuple((lora.name, lora.weight) for lora in checkpoint.loras),
        serves=describe_jobs(checkpoint, bool(programs.previews)),
    )


def describe_jobs(checkpoint: Checkpoint, has_previews: bool) -> Served:
    """Return what jobs may ask of a checkpoint."""
    family, adapters = checkpoint.family, checkpoint.adapters
    return Served(
        model=PurePath(checkpoint.name).name,
        samplers=checkpoint.schedule.samplers,
        default_sampler=checkpoint.defaults.sampler,
        default_guidance_scale=checkpoint.defaults.guidance_scale,
        follows_guidance_scale=family.follows_guidance_scale,
        takes_negative_prompt=family.rows > 1,
        loras=() if adapters is None else tuple(adapters.names()[:MAX_NAMES]),
        controlnets=family.control_names[:MAX_NAMES],
        pictures=family.picture_use.value,
        has_previews=has_previews,
    )
