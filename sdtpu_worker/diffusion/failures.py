"""What a failed device program's error says: whether the devices can be used again."""

from __future__ import annotations

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
"""What XLA says when buffers or programs do not fit. Source: openxla/xla docs/errors, E0100 and E0101."""
_LOST = (
    "halted",  # a TPU core stopped: "Core halted unexpectedly", "device halted prematurely" (docs/errors, E0200)
    "UNAVAILABLE:", "ABORTED:", "DATA_LOSS:",  # absl's codes of a connection, a runtime or a memory that is gone
    "DEVICE_LOST", "device is lost", "CUDA_ERROR_", "hipError",  # errors that stay with a GPU's context
)  # fmt: skip


def is_out_of_memory(exc: Exception) -> bool:
    """Return whether the devices' memory was too small for what was asked of them."""
    return any(text in str(exc) for text in _OUT_OF_MEMORY)


def is_fatal(exc: Exception) -> bool:
    """Return whether no other try on the devices can mend what a program raised: memory or a device is gone."""
    if not isinstance(exc, RuntimeError | MemoryError):
        return False
    return is_out_of_memory(exc) or any(text in str(exc) for text in _LOST)
