"""`sdtpu_slots_per_device = auto`: measure 1, 2, 4 and 8 slots per device once, and keep the best choice for good.

For good, because pixels are bitwise equal only within one slot count. The saved choice is a file beside the compiled
programs: a worker that starts again, or another worker with the same cache folder, reads it instead of measuring.
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
from sdtpu_worker.kept_files import write_whole
from sdtpu_worker.models.kernel_table import AUTO
from sdtpu_worker.redaction import brief

logger = logging.getLogger(__name__)

CANDIDATES = (1, 2, 4, 8)
_WORTH_IT = 0.95  # more slots delay every job in them: only for a gain that is not noise


def choose_slots_per_device(make_engine: Callable[[int], Engine], saved_choice: Path | None) -> Engine:
    """Return the engine whose slot count takes the fewest device seconds for a step of one image.

    Args:
        make_engine: makes a warm engine with this many slots per device.
        saved_choice: the file that keeps the choice; None to measure at every start.
    """
    if saved_choice is not None and (slots := _read_choice(saved_choice)) is not None:
        logger.info("%d slots per device, as measured before (%s)", slots, saved_choice)
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
    if saved_choice is not None:
        curve = {str(slots): round(seconds, 6) for slots, seconds in measured.items()}
        _save_choice(saved_choice, json.dumps({"slots_per_device": best, "seconds_per_image_step": curve}) + "\n")
    return engine if engine.info.slots_per_device == best else make_engine(best)


def saved_choice_file(
    folder: Path | None, checkpoint: Checkpoint, device: jax.Device, resolutions: Any, attention: str = AUTO
) -> Path | None:
    """Return the file that keeps the choice for one configuration; None without a cache folder."""
    if folder is None:
        return None
    facts: tuple[Any, ...] = checkpoint.name, str(checkpoint.dtype), device.device_kind, resolutions, jax.__version__
    facts = *facts, checkpoint.prompt_windows
    if checkpoint.adapters is not None:
        facts = *facts, checkpoint.adapters.layout.rank
    if attention != AUTO:
        facts = *facts, attention
    return folder / f"slots-per-device-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def _read_choice(saved_choice: Path) -> int | None:
    """Return the saved choice; None if the file is missing, or holds no choice."""
    try:
        slots = json.loads(saved_choice.read_text(encoding="utf-8"))["slots_per_device"]
        if type(slots) is int and slots in CANDIDATES:
            return slots
        reason = f"slots_per_device is {brief(slots)}"
    except FileNotFoundError:
        return None
    except Exception as exc:  # half a file, another kind of file, no permission
        reason = f"{type(exc).__name__}: {exc}"
    logger.warning("the saved slot count in %s cannot be read, so it is measured again: %s", saved_choice, reason)
    return None


def _save_choice(saved_choice: Path, text: str) -> None:
    """Replace the file as a whole: a half-written file never has its name."""
    try:
        write_whole(saved_choice, text.encode())
    except OSError as exc:
        logger.warning("the slot count could not be saved, so the next start measures it again: %s", exc)


def _image_step_s(engine: Engine) -> float:
    """Return the seconds of a step, of all resolutions together, for each slot of a device."""
    info = engine.info
    return sum(costs.step_s(info.num_devices) for costs in engine.costs.values()) / info.slots_per_device
