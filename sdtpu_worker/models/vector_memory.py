"""How much of a TPU's vector memory a kernel asks for: what it leaves, XLA fills with arrays between kernels."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import jax.numpy as jnp

_LEAST, _MOST = 16 * 2**20, 100 * 2**20
_IN_FLIGHT = 3  # intermediates of this many heads or products, which the compiler lets overlap


def vector_memory(blocks: Iterable[tuple[tuple[int, ...], Any]], intermediate: int) -> int:
    """Return the bytes that a kernel may take, from 16 MiB, the default, to 100 MiB of the 128 that there are.

    Args:
        blocks: shape and dtype of each block of an operand or a result; the next one is fetched meanwhile.
        intermediate: numbers of the largest array inside, float32 before and after, bfloat16 as an operand.
    """
    of_blocks = sum(prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in blocks)
    return min(_MOST, max(_LEAST, 2 * of_blocks + _IN_FLIGHT * (4 + 4 + 2) * intermediate))
