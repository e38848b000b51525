"""From the settings to an engine that is ready to serve: find devices, load the checkpoint, compile, calibrate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.config import Config
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import Checkpoint, LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.kept_programs import delete_all
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.slot_count import choose_slots_per_device, saved_choice_file

logger = logging.getLogger(__name__)


def start_engine(config: Config, on_phase: Callable[[str], None] = lambda phase: None) -> Engine:
    """Return an engine as the settings describe it, which has really run every program.

    Args:
        config: the settings.
        on_phase: called with what begins, as in "compiling": each part may take minutes.

    Raises:
        ConfigurationError: a device, a checkpoint or a size that is configured is not there.
    """
    started = time.monotonic()
    on_phase("looking for devices")
    devices = find_devices(config.platform, config.cpu_devices)
    logger.info(
        "found %d devices of kind %s (platform %s, sdtpu_platform = %s)",
        len(devices), devices[0].device_kind, devices[0].platform, config.platform,
    )  # fmt: skip
    with CompileCache(config.compile_cache) as cache:
        dtype = choose_dtype(config.dtype, devices[0].platform)
        on_phase(f"loading the checkpoint {config.model}")
        options = LoadOptions(
            config.revision,
            config.guidance,
            config.tokenizer,
            config.prediction_type,
            config.loras_merged,
            config.image_inputs,
            config.controlnets,
            config.loras,
            config.lora_rank,
        )
        checkpoint = load_checkpoint(config.model, dtype, options)
        for lora in checkpoint.loras:
            logger.info("merged the LoRA %s with the weight %g into %d tensors", lora.name, lora.weight, lora.count)
        if checkpoint.adapters is not None:
            names = ", ".join(checkpoint.adapters.names()) or "none yet"
            logger.info("LoRAs that jobs can name (sdtpu_loras): %s; room for a rank of %d", names, config.lora_rank)
        logger.info("loaded checkpoint %s in %s after %.1f s", config.model, dtype.__name__, time.monotonic() - started)

        def make(slots_per_device: int) -> Engine:
            on_phase(f"compiling and running every program with {slots_per_device} slots per device")
            has_previews = config.preview_every > 0
            return make_warm_engine(
                checkpoint, devices, slots_per_device, config.resolutions, cache, has_previews, config.vae_tiling
            )

        if isinstance(config.slots_per_device, int):
            engine = make(config.slots_per_device)
        else:
            saved_choice = saved_choice_file(cache.path, checkpoint, devices[0], config.resolutions)
            engine = choose_slots_per_device(make, saved_choice)
    info = engine.info
    logger.info(
        "loaded %d kept programs in %.2f s; traced the others in %.2f s, compiled in %.2f s (compile cache: %d hits,"
        " %d misses)",
        info.kept_programs, info.load_s, info.trace_s, info.compile_s, info.cache_hits, info.cache_misses,
    )  # fmt: skip
    return engine


def make_warm_engine(
    checkpoint: Checkpoint,
    devices: list[jax.Device],
    slots_per_device: int = 1,
    resolutions: tuple[Lane, ...] | None = None,
    compile_cache: CompileCache | None = None,
    with_previews: bool = False,
    vae_tiling: str = "auto",
) -> Engine:
    """Return an engine that is compiled and calibrated; see `Engine` for the arguments and what it raises.

    Calibrating runs every program. When that fails, and some were loaded whole, all are compiled again.
    """

    def make() -> Engine:
        return Engine(checkpoint, devices, slots_per_device, resolutions, compile_cache, with_previews, vae_tiling)

    engine = make()
    try:
        engine.adopt(calibrate(engine))
    except RuntimeError as exc:
        if not engine.info.kept_programs or is_out_of_memory(exc):
            raise
        assert compile_cache is not None
        assert compile_cache.programs is not None
        logger.warning("the programs in %s do not run, and are compiled again: %s", compile_cache.programs, exc)
        delete_all(compile_cache.programs)
        engine.close()
        engine = make()
        engine.adopt(calibrate(engine))
    return engine


def choose_dtype(name: str, platform: str) -> Any:
    """Return the dtype that `sdtpu_dtype` names; `auto` is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return {"bfloat16": jnp.bfloat16, "float32": jnp.float32}[name]
