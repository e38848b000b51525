"""Between PyTorch's layout of a tensor and this package's: the only difference is the order of axes, by a rule.

A weight of four axes is a convolution, OIHW in PyTorch and HWIO here. A weight of two axes is a linear layer, (out, in)
in PyTorch and (in, out) here, unless it is the table of an embedding. All other tensors are as they are.
"""

from __future__ import annotations

import numpy as np


def axes_from_pytorch(name: str, rank: int) -> tuple[int, ...] | None:
    """Return the order of PyTorch's axes in this package's layout, for `transpose`; None where it is the same."""
    if rank == 4:
        return (2, 3, 1, 0)
    is_linear = rank == 2 and name.endswith("weight") and not name.endswith("_embedding.weight")
    return (1, 0) if is_linear else None


def from_pytorch(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a view of a tensor in this package's layout."""
    axes = axes_from_pytorch(name, tensor.ndim)
    return tensor if axes is None else tensor.transpose(axes)


def to_pytorch(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a view of a tensor in PyTorch's layout."""
    axes = axes_from_pytorch(name, tensor.ndim)
    return tensor if axes is None else tensor.transpose(np.argsort(axes))


def pytorch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a tensor of this package's layout has in PyTorch's."""
    axes = axes_from_pytorch(name, len(shape))
    return shape if axes is None else tuple(shape[axes.index(i)] for i in range(len(shape)))
