"""Load a model's parameters: one tensor at a time, in our layout and the serving dtype, each checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sdtpu_worker.diffusion.loading.fit import fit
from sdtpu_worker.diffusion.loading.tensors import Shapes, StoredTensor, TensorSource, some
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch

# Changes of parameters by name: each takes and returns a float32 array in our layout.
Changes = Mapping[str, Callable[[np.ndarray], np.ndarray]]


def iterate_weights(
    source: TensorSource, shapes: Shapes, dtype: Any, changes: Changes | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a model's parameters one by one: place each and drop it, and no more than one is in memory.

    Names and shapes are checked before the first is yielded.

    Args:
        source: from `open_part`, `open_weights` or `SingleFile.part`.
        shapes: of every parameter by PyTorch's name, in our layout: linear (in, out), convolution HWIO, embeddings
            and others as in PyTorch.
        dtype: of the arrays that are yielded, float32 or bfloat16.
        changes: what is added before the cast, from `merge_loras`.

    Yields:
        The name, and a C-contiguous array of its own memory, in the order of `shapes`.

    Raises:
        InvalidCheckpoint: tensors are missing, left over, of another shape or type (before the first), or have
            values that are not finite numbers (after the last that is sound).
    """
    dtype = np.dtype(dtype)
    changes = changes or {}
    tensors = fit(source, shapes)
    not_finite = []
    for name, tensor in tensors.items():
        array = _load(name, tensor, dtype, changes.get(name))
        if not np.isfinite(array).all():
            not_finite.append(name)
        if not not_finite:
            yield name, array
        del array  # or it would stay while the next is read
    if not_finite:
        raise InvalidCheckpoint(
            f"{source.label}: NaN or infinity in {some(not_finite)} as {dtype.name}; the file was broken when it was"
            " made or merged: take another"
        )


def read_weights(
    source: TensorSource, shapes: Shapes, dtype: Any, changes: Changes | None = None
) -> dict[str, np.ndarray]:
    """Return all of a model's parameters as host arrays by name; see `iterate_weights`."""
    return dict(iterate_weights(source, shapes, dtype, changes))


def _load(
    name: str, tensor: StoredTensor, dtype: np.dtype, change: Callable[[np.ndarray], np.ndarray] | None
) -> np.ndarray:
    array = from_pytorch(name, tensor.read())
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is found and named by the caller
        if change is not None:
            array = change(array.astype(np.float32))
        return array.astype(dtype, order="C")
