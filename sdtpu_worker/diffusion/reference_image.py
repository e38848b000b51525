"""The reference image: every device draws it at the start, and again whenever somebody doubts that it still works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from sdtpu_worker.aggregator.plan import Lane, Phase, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.engine_io import DecodedImage, Tick
from sdtpu_worker.diffusion.preparation import PreparedJob, plain_request
from sdtpu_worker.errors import EngineUnavailable

_TASK_ID = "reference image"


class DrawingEngine(Protocol):
    """What drawing the reference image needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """The facts that do not change."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The loaded model."""

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Mapping[str, np.ndarray]) -> PreparedJob:
        """Do the host's part of a job."""

    def execute(self, plan: Plan, jobs: Mapping[str, PreparedJob]) -> Tick:
        """Dispatch a plan."""

    def reset(self) -> None:
        """Empty every slot."""


def draw_reference_image(engine: DrawingEngine, lane: Lane, devices: Collection[int]) -> dict[int, DecodedImage]:
    """Have devices draw the same image of one step, in their slot 0, and return the image of each."""
    job = engine.prepare(_TASK_ID, *plain_request(engine.checkpoint.family, lane, _TASK_ID, seed=0, steps=1))
    phases = Phase(insert=(0, _TASK_ID), steps=1), Phase(decode=(0, _TASK_ID))
    plan = Plan(lane, tuple(phases if d in devices else () for d in range(engine.info.num_devices)))
    images = engine.execute(plan, {_TASK_ID: job}).wait()
    return {image.device: image for image in images}


def agree(images: Mapping[int, DecodedImage]) -> tuple[np.ndarray, frozenset[int]]:
    """Find the image that most devices drew; of equally many the one that is finite, then that of the first device.

    Args:
        images: by device, the images of one request.

    Returns:
        Its `(height, width, 3) uint8` pixels, and the devices that drew another one.
    """
    drawn = {device: (image.finite, image.pixels.tobytes()) for device, image in images.items()}
    votes = Counter(drawn.values())
    chosen = max(drawn, key=lambda device: (votes[drawn[device]], drawn[device][0], -device))
    return images[chosen].pixels, frozenset(device for device in drawn if drawn[device] != drawn[chosen])


def find_lost_devices(
    engine: DrawingEngine, wanted: Mapping[Lane, np.ndarray], devices: Collection[int]
) -> frozenset[int]:
    """Return those of the devices that do not draw the reference image as it was at the start.

    Args:
        engine: with no job in a slot and no tick in flight; what is in its slots afterwards is left from the drawing.
        wanted: by lane, the `(height, width, 3) uint8` pixels that they must draw.
        devices: the devices to ask.

    Raises:
        EngineUnavailable: none of the devices draws it.
        Exception: what the device program raised, whichever device is at work.
    """
    try:
        found = _differing(engine, wanted, devices)
    except Exception:  # a program that fails does not say on which device
        found = frozenset(device for device in devices if _fails(engine, wanted, device))
        if len(found) == len(devices):
            raise
    if len(found) == len(devices):
        raise EngineUnavailable("no device draws the reference image any more as it did at the start")
    return found


def _differing(engine: DrawingEngine, wanted: Mapping[Lane, np.ndarray], devices: Collection[int]) -> frozenset[int]:
    """Return those of the devices that draw another image, or one that is not finite."""
    drawn = [
        (image, pixels)
        for lane, pixels in wanted.items()
        for image in draw_reference_image(engine, lane, devices).values()
    ]
    return frozenset(i.device for i, pixels in drawn if not i.finite or not np.array_equal(i.pixels, pixels))


def _fails(engine: DrawingEngine, wanted: Mapping[Lane, np.ndarray], device: int) -> bool:
    """Return whether a device fails, or draws another image, while no other device has anything to do."""
    engine.reset()  # a program that failed took the slots with it
    try:
        return bool(_differing(engine, wanted, [device]))
    except Exception:
        return True
