"""What a kernel costs, for XLA: it then keeps or fetches what pays in the vector memory that a kernel leaves free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


def kernel_cost(flops: int, arrays: Iterable[Any], exponentials: int = 0) -> pl.CostEstimate:
    """Return a kernel's cost; without one XLA takes it to be over at once, and fetches nothing ahead meanwhile.

    Args:
        flops: of its products.
        arrays: operands and results, by shape and dtype; each passes through the HBM once at most.
        exponentials: and other functions that are no sums and products.
    """
    num_bytes = sum(each.size * jnp.dtype(each.dtype).itemsize for each in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=num_bytes)
