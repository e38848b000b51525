"""Pictures of numbers: what the fake engine draws, and how a test reads it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

LANE = (8, 8)


def picture(count: int) -> np.ndarray:
    """Return a picture of a number, `(8, 8, 3) uint8`."""
    return np.full((*LANE, 3), [count >> 16 & 255, count >> 8 & 255, count & 255], np.uint8)


def expected_count(seed: int, steps: int) -> int:
    """Return the number that a job's picture should show."""
    return seed % 1000 * 1000 + steps


def shown_count(image: bytes) -> int:
    """Return the number that a stored picture shows."""
    red, green, blue = Image.open(io.BytesIO(image)).getpixel((0, 0))  # type: ignore[misc]  # RGB pixels are tuples
    return (red << 16) + (green << 8) + blue
