"""`sdtpu_slots_per_device = auto`: measure what 1, 2, 4 and 8 slots on a device give, once, and keep the best for good.

For good, because pixels are bitwise equal only within one slot count: the choice is kept beside the compiled programs,
and a worker that starts again, or another one with the same cache folder, takes it over.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.failures import is_out_of_memory

logger = logging.getLogger(__name__)

CANDIDATES = (1, 2, 4, 8)
_WORTH_IT = 0.95  # more slots delay every job in them: only for a gain that is not noise


def choose_slots_per_device(make_engine: Callable[[int], Engine], memory: Path | None) -> Engine:
    """Return the engine whose slot count takes the fewest device seconds for a step of one image.

    Args:
        make_engine: makes a warm engine with this many slots per device.
        memory: the file that the choice is kept in; None to forget it.
    """
    if memory is not None and memory.exists():
        slots = int(json.loads(memory.read_text())["slots_per_device"])
        logger.info("%d slots per device, as measured before (%s)", slots, memory)
        return make_engine(slots)
    measured: dict[int, float] = {}
    for slots in CANDIDATES:
        try:
            engine = make_engine(slots)
        except Exception as exc:
            if not measured or not is_out_of_memory(exc):
                raise
            logger.info("%d slots per device do not fit the devices' memory", slots)
            break
        measured[slots] = _image_step_s(engine)
        logger.info("%d slots per device: %.2f ms for a step of one image", slots, 1000 * measured[slots])
        if len(measured) > 1 and measured[slots] > _WORTH_IT * min(list(measured.values())[:-1]):
            break  # the curve is flat or rises from here on
    best = 1
    for slots, seconds in measured.items():
        if seconds < _WORTH_IT * measured[best]:
            best = slots
    if memory is not None:
        curve = {str(slots): round(seconds, 6) for slots, seconds in measured.items()}
        memory.write_text(json.dumps({"slots_per_device": best, "seconds_per_image_step": curve}) + "\n")
    return engine if engine.info.slots_per_device == best else make_engine(best)


def memory_file(folder: Path | None, checkpoint: Checkpoint, device: jax.Device, resolutions: Any) -> Path | None:
    """Return where the choice for one configuration is kept."""
    if folder is None:
        return None
    facts = (checkpoint.name, str(checkpoint.dtype), device.device_kind, resolutions, jax.__version__)
    return folder / f"slots-per-device-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def _image_step_s(engine: Engine) -> float:
    """Return the seconds of a step, of all resolutions together, for each slot of a device."""
    info = engine.info
    return sum(costs.step_s(info.num_devices) for costs in engine.costs.values()) / info.slots_per_device
