"""From the settings to an engine that is ready to serve: find devices, load the checkpoint, compile, calibrate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.config import Config
from sdtpu_worker.diffusion.cache import PROGRAMS, CompileCache, cache_folder
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import Checkpoint, LoadOptions, open_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.kept_programs import delete_all
from sdtpu_worker.diffusion.loading_checkpoint import LoadingCheckpoint
from sdtpu_worker.diffusion.saved_costs import SavedCosts
from sdtpu_worker.diffusion.sharding import find_devices, platform_of
from sdtpu_worker.diffusion.slot_count import choose_slots_per_device, saved_choice_file
from sdtpu_worker.models.kernel_table import AUTO, check_wanted

logger = logging.getLogger(__name__)


def start_engine(config: Config, on_phase: Callable[[str], None] = lambda phase: None) -> Engine:
    """Return an engine as the settings describe it, which has really run every program.

    Args:
        config: the settings.
        on_phase: called with what begins, as in "compiling": each part may take minutes.

    Raises:
        ConfigurationError: a device, a checkpoint, a size or an attention that is configured is not there.
    """
    on_phase("looking for devices")
    devices = find_devices(config.platform, config.cpu_devices)
    logger.info(
        "found %d devices of kind %s (platform %s, sdtpu_platform = %s)",
        len(devices), devices[0].device_kind, devices[0].platform, config.platform,
    )  # fmt: skip
    ahead = None if config.programs is None else programs_folder(config)
    with CompileCache(config.compile_cache, ahead=ahead) as cache:
        dtype = choose_dtype(config.dtype, devices[0].platform)
        check_wanted(platform_of(devices[0]), config.attention)  # before the checkpoint is read
        on_phase(f"reading the configs of the checkpoint {config.model}")
        with LoadingCheckpoint(*open_checkpoint(config.model, dtype, load_options(config))) as checkpoint:

            def make(slots_per_device: int) -> Engine:
                return make_warm_engine(
                    checkpoint,
                    devices,
                    slots_per_device,
                    config.resolutions,
                    cache,
                    config.preview_every > 0,
                    config.vae_tiling,
                    config.attention,
                    on_phase,
                )

            if isinstance(config.slots_per_device, int):
                engine = make(config.slots_per_device)
            else:
                outline = checkpoint.outline
                saved_choice = saved_choice_file(cache.path, outline, devices[0], config.resolutions, config.attention)
                engine = choose_slots_per_device(make, saved_choice)
    _log_checkpoint(engine.checkpoint, config)
    info = engine.info
    logger.info(
        "loaded %d kept programs in %.2f s; traced the others in %.2f s, compiled in %.2f s (compile cache: %d hits,"
        " %d misses)",
        info.kept_programs, info.load_s, info.trace_s, info.compile_s, info.cache_hits, info.cache_misses,
    )  # fmt: skip
    return engine


def programs_folder(config: Config) -> Path | None:
    """Return the folder into which `sdtpu compile` puts programs; None where the settings have none."""
    if config.programs is not None:
        return Path(config.programs).expanduser()
    cache = cache_folder(config.compile_cache)
    return None if cache is None else cache / PROGRAMS


def load_options(config: Config) -> LoadOptions:
    """Return what the settings say about loading a checkpoint."""
    return LoadOptions(
        config.revision,
        config.guidance,
        config.tokenizer,
        config.prediction_type,
        config.loras_merged,
        config.image_inputs,
        config.controlnets,
        config.loras,
        config.lora_rank,
        config.prompt_windows,
        config.embeddings,
    )


def _log_checkpoint(checkpoint: Checkpoint, config: Config) -> None:
    for lora in checkpoint.loras:
        logger.info("merged the LoRA %s with the weight %g into %d tensors", lora.name, lora.weight, lora.count)
    if checkpoint.adapters is not None:
        names = ", ".join(checkpoint.adapters.names()) or "none yet"
        logger.info("LoRAs that jobs can name (sdtpu_loras): %s; room for a rank of %d", names, config.lora_rank)
    if checkpoint.embeddings:
        words = ", ".join(word for word, _ in checkpoint.embeddings)
        logger.info("words with vectors of their own (sdtpu_embeddings): %s", words)
    logger.info("loaded the checkpoint %s in %s", config.model, checkpoint.dtype.__name__)


def make_warm_engine(
    checkpoint: Checkpoint | LoadingCheckpoint,
    devices: list[jax.Device],
    slots_per_device: int = 1,
    resolutions: tuple[Lane, ...] | None = None,
    compile_cache: CompileCache | None = None,
    with_previews: bool = False,
    vae_tiling: str = "auto",
    attention: str = AUTO,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Engine:
    """Return an engine that is compiled and calibrated; see `Engine` for the arguments and what it raises.

    Calibrating runs every program. When that fails, and some were loaded whole, all are compiled again.
    """

    def make() -> Engine:
        sizes = slots_per_device, resolutions
        return Engine(checkpoint, devices, *sizes, compile_cache, with_previews, vae_tiling, attention, on_phase)

    engine = make()
    try:
        _run_every_program(engine, compile_cache, on_phase)
    except RuntimeError as exc:
        if not engine.info.kept_programs or is_out_of_memory(exc):
            raise
        assert compile_cache is not None
        folders = [each for each in (compile_cache.ahead, compile_cache.programs) if each is not None]
        logger.warning("the programs in %s do not run, and are compiled again: %s", " or ".join(map(str, folders)), exc)
        compile_cache.ahead = None
        if compile_cache.programs is not None:
            delete_all(compile_cache.programs)
        engine.close()
        engine = make()
        _run_every_program(engine, compile_cache, on_phase)
    return engine


def _run_every_program(engine: Engine, cache: CompileCache | None, on_phase: Callable[[str], None]) -> None:
    """Calibrate an engine; an engine whose programs were all kept takes over the costs that were saved with them."""
    on_phase("running every program")
    saved, known, info = None, None, engine.info
    if cache is not None and cache.path is not None and cache.programs is not None:
        saved = SavedCosts(cache.path, engine.fingerprints, engine.checkpoint.family, list(engine.mesh.devices.flat))
        known = saved.load() if not info.cache_hits + info.cache_misses else None
    engine.adopt(calibrate(engine, known))
    if saved is not None and known is None:
        saved.save(engine.costs)


def choose_dtype(name: str, platform: str) -> Any:
    """Return the dtype that `sdtpu_dtype` names; `auto` is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return {"bfloat16": jnp.bfloat16, "float32": jnp.float32}[name]
