"""`sdtpu_slots_per_device = auto`: measure what 1, 2, 4 and 8 slots on a device give, once, and keep the best for good.

For good, because pixels are bitwise equal only within one slot count: the choice is kept beside the compiled programs,
and a worker that starts again, or another one with the same cache folder, takes it over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.show import show

logger = logging.getLogger(__name__)

CANDIDATES = (1, 2, 4, 8)
_WORTH_IT = 0.95  # more slots delay every job in them: only for a gain that is not noise


def choose_slots_per_device(make_engine: Callable[[int], Engine], memory: Path | None) -> Engine:
    """Return the engine whose slot count takes the fewest device seconds for a step of one image.

    Args:
        make_engine: makes a warm engine with this many slots per device.
        memory: the file that the choice is kept in; None to forget it.
    """
    if memory is not None and (slots := _recall(memory)) is not None:
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
        _remember(memory, json.dumps({"slots_per_device": best, "seconds_per_image_step": curve}) + "\n")
    return engine if engine.info.slots_per_device == best else make_engine(best)


def memory_file(folder: Path | None, checkpoint: Checkpoint, device: jax.Device, resolutions: Any) -> Path | None:
    """Return where the choice for one configuration is kept."""
    if folder is None:
        return None
    facts = (checkpoint.name, str(checkpoint.dtype), device.device_kind, resolutions, jax.__version__)
    return folder / f"slots-per-device-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def _recall(memory: Path) -> int | None:
    """Return the choice that is kept; None if there is none, or if what is kept is none."""
    try:
        slots = json.loads(memory.read_text(encoding="utf-8"))["slots_per_device"]
        if type(slots) is int and slots in CANDIDATES:
            return slots
        reason = f"slots_per_device is {show(slots)}"
    except FileNotFoundError:
        return None
    except Exception as exc:  # half a file, another kind of file, no permission
        reason = f"{type(exc).__name__}: {exc}"
    logger.warning("the slot count that %s keeps is measured anew, since it cannot be read: %s", memory, reason)
    return None


def _remember(memory: Path, text: str) -> None:
    """Replace the file as a whole: what is half-written never has its name."""
    half = memory.with_name(f"{memory.name}.{uuid.uuid4().hex}")
    try:
        try:
            half.write_text(text, encoding="utf-8")
            os.replace(half, memory)
        finally:
            half.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("the slot count could not be kept, the next start measures it again: %s", exc)


def _image_step_s(engine: Engine) -> float:
    """Return the seconds of a step, of all resolutions together, for each slot of a device."""
    info = engine.info
    return sum(costs.step_s(info.num_devices) for costs in engine.costs.values()) / info.slots_per_device
