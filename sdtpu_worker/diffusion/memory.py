"""Whether a model fits into a device's memory: said at the start with numbers, and not by a job that fails later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sdtpu_worker.errors import ConfigurationError

WHAT_MAKES_IT_SMALLER = (
    "lower sdtpu_slots_per_device, name fewer or smaller sdtpu_resolutions, or set sdtpu_dtype to bfloat16"
)
_GIB = 2**30


def device_memory(device: jax.Device) -> int | None:
    """Return how many bytes programs can use on a device; None where it does not say, as a CPU."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or None


def memory_of(device: jax.Device) -> dict[str, int]:
    """Return the bytes of a device's memory in use (`used`), their `peak` and their `limit`, as far as it says."""
    stats = device.memory_stats() or {}
    names = {"used": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {kind: stats[name] for kind, name in names.items() if stats.get(name) is not None}


def bytes_per_device(tree: Any, num_devices: int = 1) -> int:
    """Return the bytes that arrays take on one device.

    Args:
        tree: of arrays, or of their shapes.
        num_devices: over which they are split; 1 for arrays that every device has whole.
    """
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves) // num_devices


def memory_needs(
    parameters: int, slots: int = 0, programs: Iterable[jax.stages.Compiled] = (), adapters: int = 0
) -> dict[str, int]:
    """Return what a device must hold at a time, in bytes by kind.

    Args:
        parameters: bytes.
        slots: bytes of the slots of all resolutions.
        programs: the compiled programs; only one runs at a time, but all are loaded.
        adapters: bytes of the bank for the LoRAs of single jobs.
    """
    analyses = [program.memory_analysis() for program in programs]
    return {
        "parameters": parameters,
        "slots": slots,
        "LoRAs": adapters,
        "programs": sum(each.generated_code_size_in_bytes for each in analyses),
        # What a program gets and gives back in place are the parameters and the slots.
        "working memory": max(
            (a.temp_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes for a in analyses), default=0
        ),
    }


def check_fits(device: jax.Device, needs: Mapping[str, int]) -> None:
    """Make sure that everything that a device must hold at a time fits into its memory.

    Args:
        device: one of equal devices.
        needs: of `memory_needs`.

    Raises:
        ConfigurationError: it does not; the text has the numbers and what makes them smaller.
    """
    check_limit(device_memory(device), device.device_kind, needs)


def check_limit(limit: int | None, device_kind: str, needs: Mapping[str, int]) -> None:
    """Make sure that everything that a device must hold at a time fits into some bytes of memory.

    Args:
        limit: the bytes; None for as many as are needed.
        device_kind: of the device, for the error.
        needs: of `memory_needs`.

    Raises:
        ConfigurationError: it does not fit.
    """
    needed = sum(needs.values())
    if limit is None or needed <= limit:
        return
    listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needs.items() if size)
    raise ConfigurationError(
        f"the model does not fit: a device would be out of memory. It needs {needed / _GIB:.2f} GiB ({listed}) and the"
        f" {device_kind} has {limit / _GIB:.2f}; {WHAT_MAKES_IT_SMALLER}"
    )
