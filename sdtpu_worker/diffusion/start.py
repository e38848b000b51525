"""From settings to a warm engine: find the devices, load the checkpoint, compile and really run every program."""

from __future__ import annotations

import logging
import time
from typing import Any

from sdtpu_worker.config import Config
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine, choose_dtype
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.slot_count import choose_slots_per_device, memory_file

logger = logging.getLogger(__name__)


def start_engine(config: Config) -> Engine:
    """Return a warm engine on all of this host's devices.

    Args:
        config: the settings.

    Raises:
        ConfigurationError: a device, a checkpoint or a size that is configured is not there.
    """
    started = time.monotonic()
    devices = find_devices(config.platform, config.cpu_devices)
    logger.info(
        "found %d devices of kind %s (platform %s, sdtpu_platform = %s)",
        len(devices), devices[0].device_kind, devices[0].platform, config.platform,
    )  # fmt: skip
    cache = CompileCache(config.compile_cache)
    dtype: Any = choose_dtype(config.dtype, devices[0].platform)
    checkpoint = load_checkpoint(config.model, dtype, config.revision)
    logger.info("loaded checkpoint %s in %s after %.1f s", config.model, dtype.__name__, time.monotonic() - started)

    def make_engine(slots_per_device: int) -> Engine:
        return Engine(checkpoint, devices, slots_per_device, config.resolutions, cache, config.preview_every > 0)

    if isinstance(config.slots_per_device, int):
        engine = make_engine(config.slots_per_device)
    else:
        memory = memory_file(cache.path, checkpoint, devices[0], config.resolutions)
        engine = choose_slots_per_device(make_engine, memory)
    logger.info(
        "traced %d programs in %.2f s, compiled in %.2f s (compile cache: %d hits, %d misses)",
        len(engine.resolutions), engine.trace_s, engine.compile_s, engine.cache_hits, engine.cache_misses,
    )  # fmt: skip
    return engine
