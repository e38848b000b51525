"""Weights that anyone can draw again from a tensor's name and shape, so that no test needs files of them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping

import numpy as np


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the tensor that stands for a name: always the same, on every machine.

    The scale keeps a signal about as large as it came in, so that a deep model's output depends on its input: weights
    of norms lie around one, biases around zero, others have the variance of one over the number of inputs. Of an
    activation a part of the signal is lost, so that residual branches are a bit smaller than what they are added to.

    Args:
        name: PyTorch's name of the tensor.
        shape: in PyTorch's layout.

    Returns:
        float32.
    """
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(("embedding.weight", "class_embedding")) and len(shape) < 4:
        return noise * np.float32(0.5)
    if name.endswith("_weights"):  # the safety checker's thresholds
        return np.float32(0.5) + noise * np.float32(0.1)
    if len(shape) < 2:
        return np.float32(name.endswith(".weight")) + noise * np.float32(0.1)
    if name.endswith("_embeds"):
        return noise
    return noise * np.float32(1.3 / np.sqrt(np.prod(shape[1:])))


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return a tensor for each name, in PyTorch's layout."""
    return {name: random_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def random_input(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Return an input that stands for a name, float32."""
    noise = np.random.default_rng(zlib.crc32(f"input {name}".encode())).standard_normal(shape)
    return noise.astype(np.float32) * np.float32(scale)


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what tells one set of names and shapes from another."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
