"""Read a safetensors file: the header is checked in full, then each tensor is read by itself when it is asked for.

The format is eight bytes with the header's length (little-endian), the header (JSON: name to dtype, shape and the
first and last byte of the data), and the data. It is read here because the `safetensors` package gives NumPy no
bfloat16 and no float8 arrays, and maps the whole file: each page that was touched would count as the process's.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sdtpu_worker.diffusion.loading.tensors import StoredTensor
from sdtpu_worker.errors import InvalidCheckpoint

REMEDY = (
    "convert it where it is trusted: load it with diffusers' `from_pretrained` and write it with"
    " `save_pretrained(safe_serialization=True)`"
)
_MAX_HEADER = 100_000_000  # bytes; the reference reader's limit, an SDXL file has 300,000
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # of protocols 2 to 5, and of torch.save's zip
_LFS_POINTER = b"version https://git-lfs"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class _Broken(Exception):
    """The file breaks the format; the text says how."""


def open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata; only the header is read.

    Raises:
        InvalidCheckpoint: the file is missing, cut short, a pickle, or its header is not what the format allows.
    """
    try:
        header, start, size = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise _Broken("its metadata is no object")
        tensors = {name: _stored_tensor(path, name, entry, start, size) for name, entry in header.items()}
        _check_no_overlap(header)
    except (_Broken, OSError, ValueError, RecursionError) as exc:
        raise broken_file(path, exc) from exc
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def broken_file(path: Path, exc: Exception) -> InvalidCheckpoint:
    """Return the error that says why a file could not be read: often it is a pickle under another name."""
    size, start = "missing", b""
    if path.is_file():
        size = f"{path.stat().st_size:,} bytes"
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    if _PICKLE_MAGIC.match(start):
        return InvalidCheckpoint(
            f"{path} is a pickle, whatever its name says, and can run code when it is opened; {REMEDY}"
        )
    if start == _LFS_POINTER:
        return InvalidCheckpoint(
            f"{path} is a pointer of Git LFS, not the weights themselves; fetch them (`git lfs pull`)"
        )
    cause = str(exc) if isinstance(exc, _Broken) else f"{type(exc).__name__}: {exc}"
    return InvalidCheckpoint(f"{path} is not a complete weights file ({size}): {cause}; download or convert it again")


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, where the data starts, and how many bytes of data there are."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise _Broken(f"its header would have {length:,} bytes")
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    if not isinstance(header, dict):
        raise _Broken("its header is no object")
    return header, 8 + length, size - 8 - length


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _Broken("its header has a name twice")
    return entries


def _stored_tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"the header's entry for {name[:200]!r} must have dtype, shape and data_offsets")
    shape, offsets, stored = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _are_counts(shape) or len(shape) > 32 or not _are_counts(offsets) or len(offsets) != 2:
        raise _Broken(f"the shape or the offsets of {name[:200]!r} are no lists of whole numbers")
    dtype = _DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        raise _Broken(f"{name[:200]!r} is stored as {str(stored)[:50]!r}, which must be one of {', '.join(_DTYPES)}")
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize or last > size:
        raise _Broken(f"the data of {name[:200]!r} is not where its header says")
    return StoredTensor(tuple(shape), dtype, partial(_read, path, start + first, tuple(shape), dtype))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_no_overlap(header: dict[str, Any]) -> None:
    """Make sure that the tensors share no bytes: a small file must not stand for a huge model."""
    end = 0
    for first, last in sorted(entry["data_offsets"] for entry in header.values()):
        if first < end:
            raise _Broken("the data of two tensors overlaps")
        end = last


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
    except (OSError, ValueError) as exc:  # removed, or made shorter since its header was read
        raise broken_file(path, exc) from exc
