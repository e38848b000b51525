"""Between PyTorch's layout of a tensor and this package's: the only difference is the order of axes, by a rule.

A weight of four axes is a convolution, OIHW in PyTorch and HWIO here. A weight of two axes is a linear layer, (out, in)
in PyTorch and (in, out) here, unless it is the table of an embedding. All other tensors are as they are.
"""

from __future__ import annotations

import numpy as np


def _is_linear(name: str, rank: int) -> bool:
    return rank == 2 and name.endswith("weight") and not name.endswith("_embedding.weight")


def from_pytorch(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a view of a tensor in this package's layout."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if _is_linear(name, tensor.ndim) else tensor


def to_pytorch(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a view of a tensor in PyTorch's layout."""
    if tensor.ndim == 4:
        return tensor.transpose(3, 2, 0, 1)
    return tensor.T if _is_linear(name, tensor.ndim) else tensor


def pytorch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a tensor of this package's layout has in PyTorch's."""
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if _is_linear(name, len(shape)) else shape
