"""Tensors in safetensors files: what a file holds is known at once, and each tensor is read when it is asked for.

So a checkpoint of gigabytes needs the memory of one tensor beside what it becomes. A file may come from anybody: every
number in its header is checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_MOST_HEADER_BYTES = 100_000_000
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is in a file, or in memory already.

    Attributes:
        shape: of the array that `read` returns.
        dtype: likewise.
        read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> StoredTensor:
        """Return a tensor that is in memory."""
        return cls(array.shape, array.dtype, lambda: array)

    def transposed(self, *axes: int) -> StoredTensor:
        """Return the tensor with its axes in another order."""
        shape = tuple(self.shape[axis] for axis in axes)
        return replace(self, shape=shape, read=lambda: self.read().transpose(axes))

    def third(self, number: int) -> StoredTensor:
        """Return one of three parts of equal size along the first axis, the first being number 0."""
        size = self.shape[0] // 3
        part = slice(number * size, (number + 1) * size)
        return replace(self, shape=(size, *self.shape[1:]), read=lambda: self.read()[part])

    def reshaped(self, shape: tuple[int, ...]) -> StoredTensor:
        """Return the tensor with another shape of the same size."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))


def open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Return the tensors of a file by name, and its metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
            raise ValueError("its header is cut off, or this is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as exc:
            raise ValueError("its header is not JSON") from exc
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_no_overlap(header)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    facts = entry if isinstance(entry, dict) else {}
    kind: Any = facts.get("dtype")
    shape: Any = facts.get("shape")
    offsets: Any = facts.get("data_offsets")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"the tensor {name[:100]!r} is of a type that is not read: {str(kind)[:20]!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the header's entry of the tensor {name[:100]!r} is broken")
    dtype, (begin, end) = np.dtype(_DTYPES[kind]), offsets
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize or start + end > size:
        raise ValueError(
            f"the tensor {name[:100]!r} does not fit into the file: it is cut off, or its header is broken"
        )

    def read() -> np.ndarray:
        return np.fromfile(path, dtype, count, offset=start + begin).reshape(shape)

    return StoredTensor(tuple(shape), dtype, read)


def _check_no_overlap(header: Mapping[str, Any]) -> None:
    """Make sure that no two tensors share bytes: a small file must not stand for a huge model."""
    end = 0
    for first, last in sorted(entry["data_offsets"] for entry in header.values()):
        if first < end:
            raise ValueError("the data of two tensors overlaps")
        end = last


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**48 for each in value)
