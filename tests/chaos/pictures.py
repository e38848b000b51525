"""Pictures of numbers: what the fake engine draws, and how a test reads it; and the pictures that jobs start from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

LANE = (8, 8)
_LORAS = [("style", 0.5)]
_MASKED_ROWS = 3


def picture(count: int) -> np.ndarray:
    """Return a picture of a number, `(8, 8, 3) uint8`."""
    return np.full((*LANE, 3), [count >> 16 & 255, count >> 8 & 255, count & 255], np.uint8)


def expected_count(seed: int, steps: int, brought: int = 0) -> int:
    """Return the number that a job's picture should show.

    Args:
        seed: of the job.
        steps: of the job.
        brought: what `count_brought` makes of its pictures and LoRAs.
    """
    return brought * 1_000_000 + seed % 1000 * 1000 + steps


def shown_count(image: bytes) -> int:
    """Return the number that a stored picture shows."""
    red, green, blue = Image.open(io.BytesIO(image)).getpixel((0, 0))  # type: ignore[misc]  # RGB pixels are tuples
    return (red << 16) + (green << 8) + blue


def mixed_parameters(seed: int) -> dict[str, Any]:
    """Return what the job of a seed brings in a mix: nothing, a picture, also a mask, LoRAs, or all of them."""
    brings: dict[str, Any] = {}
    if seed % 5 in (1, 2, 4):
        brings["image"] = Image.new("RGB", LANE, (1 + seed % 3, 0, 0))
    if seed % 5 in (2, 4):
        mask = np.zeros(LANE, np.uint8)
        mask[:_MASKED_ROWS] = 255
        brings["mask_image"] = Image.fromarray(mask)
    if seed % 5 in (3, 4):
        brings["loras"] = _LORAS
    return brings


def count_brought(pictures: Mapping[str, Any], loras: Sequence[tuple[str, float]]) -> int:
    """Return a number for pictures and LoRAs, below 16: a wrong one, or one that is missing, changes it.

    Args:
        pictures: by parameter, as arrays or images: `image` has its number as the red of every pixel.
        loras: of the job.
    """
    image, mask = pictures.get("image"), pictures.get("mask_image")
    number = 0 if image is None else int(np.asarray(image)[0, 0, 0]) % 4
    number += 4 * (mask is not None and int((np.asarray(mask) > 0).sum()) == _MASKED_ROWS * LANE[1])
    return number + 8 * ([tuple(lora) for lora in loras] == _LORAS)
