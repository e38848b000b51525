"""Weights that follow from nothing but a tensor's name and shape: whoever needs a model of random weights draws the same.

The oracle (`tools/oracle`) draws them for PyTorch's models and the tests draw them for ours, so that golden files hold
outputs alone. NumPy only.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np


def draw(name: str, shape: Iterable[int]) -> np.ndarray:
    """Return a tensor in PyTorch's layout, `float32`, of a size that keeps a deep network's outputs alive."""
    shape = tuple(shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if len(shape) == 1:
        return 1 + np.float32(0.1) * values  # the weight of a norm
    if "embedding" in name and len(shape) == 2 and "time" not in name and "add_embedding" not in name:
        return np.float32(0.3) * values
    return values * np.float32(np.prod(shape[1:]) ** -0.5)


def draw_all(shapes: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
    """Return a tensor for every name, in PyTorch's layout."""
    return {name: draw(name, shape) for name, shape in shapes.items()}


def inputs(name: str, *shape: int) -> np.ndarray:
    """Return an input of a network, `float32`, standard normal."""
    return np.random.default_rng(zlib.crc32(f"input {name}".encode())).standard_normal(shape, dtype=np.float32)
