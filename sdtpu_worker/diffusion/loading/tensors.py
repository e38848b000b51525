"""What every reader of weights gives and every step of loading takes: stored tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; nothing of it is in memory until `read` is called.

    Attributes:
        shape: in PyTorch's layout: a linear weight is (out, in), a convolution (out, in, height, width).
        dtype: as stored; bfloat16 and the float8 types are those of ml_dtypes.
        read: returns the array, of `shape` and `dtype`, which the caller does not change: it may be a view.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def changed(self, shape: Shape, change: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
        """Return this tensor with a change of its array, which is applied when it is read."""
        read = self.read
        return replace(self, shape=shape, read=lambda: change(read()))


@dataclass(frozen=True)
class TensorSource:
    """The tensors of one model, under the names of diffusers or transformers (PyTorch), in PyTorch's layout.

    Attributes:
        label: the file or index, and the part where one file has several; errors begin with it.
        tensors: by name.
        remedy: what to do if they do not fit the config; errors end with it.
    """

    label: str
    tensors: Mapping[str, StoredTensor]
    remedy: str = "take weights and config from one checkpoint"

    @property
    def shapes(self) -> dict[str, Shape]:
        """The stored shapes by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def some(names: list[str], limit: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
