"""The dense layers of a transformer block, their norm and shortcut, as one kernel on a TPU.

What lies between them never leaves the chip, and the image is read and written once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.layers import normalise
from sdtpu_worker.models.vector_memory import vector_memory

_SQRT_HALF = 0.5**0.5


def gated_feed_forward(
    x: jax.Array,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    weight_in: jax.Array,
    bias_in: jax.Array,
    weight_out: jax.Array,
    bias_out: jax.Array,
    *,
    eps: float,
    block_rows: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `x + (values · gelu(gates)) @ weight_out + bias_out`.

    Values and gates lie beside each other in `norm(x) @ weight_in + bias_in`. All is float32 but the operands of the
    two products.

    Args:
        x: `(B, L, C)`.
        norm_weight, norm_bias: `(C,)`, of the norm over the last axis.
        weight_in: `(C, 2 · I)`.
        bias_in: `(2 · I,)`.
        weight_out: `(I, C)`.
        bias_out: `(C,)`.
        eps: of the norm.
        block_rows: how many of the B · L rows one step of the kernel takes.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, L, C)` in the dtype of `x`.
    """
    features, inner = x.shape[-1], weight_out.shape[0]
    wanted_rows = x.size // features
    flat = x.reshape(wanted_rows, features)
    if spare := -wanted_rows % block_rows:  # a grid that does not divide would leave rows as they were, without a word
        flat = jnp.pad(flat, ((0, spare), (0, 0)))
    rows = len(flat)

    blocks = [((block_rows, features), x.dtype)] * 2 + [(each.shape, x.dtype) for each in (weight_in, weight_out)]
    memory = vector_memory(blocks, block_rows * 2 * inner)

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0, 0))

    block = pl.BlockSpec((block_rows, features), lambda i: (i, 0))
    row = [each.astype(jnp.float32)[None] for each in (norm_weight, norm_bias, bias_in, bias_out)]
    fixed = [row[0], row[1], weight_in.astype(x.dtype), row[2], weight_out.astype(x.dtype), row[3]]
    flops = 2 * rows * (weight_in.size + weight_out.size)
    out: jax.Array = pl.pallas_call(
        partial(_kernel, inner=inner, eps=eps),
        grid=(rows // block_rows,),
        in_specs=[block, *map(whole, fixed)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        cost_estimate=kernel_cost(flops, [flat, *fixed, flat], rows * inner),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=memory),
        interpret=interpret,
        name="gated_feed_forward",
    )(flat, *fixed)
    return out[:wanted_rows].reshape(x.shape)


def _kernel(
    x_ref: Any,
    norm_weight: Any,
    norm_bias: Any,
    weight_in: Any,
    bias_in: Any,
    weight_out: Any,
    bias_out: Any,
    out_ref: Any,
    *,
    inner: int,
    eps: float,
) -> None:
    """Do it for a block of rows."""
    x = x_ref[...].astype(jnp.float32)
    normed = normalise(x, norm_weight[...], norm_bias[...], eps).astype(x_ref.dtype)

    def product(columns: slice) -> jax.Array:
        found = jnp.dot(normed, weight_in[:, columns], preferred_element_type=jnp.float32)
        return found + bias_in[:, columns]

    values, gates = product(slice(0, inner)), product(slice(inner, 2 * inner))
    gated = values * (0.5 * gates * (1 + jax.lax.erf(gates * _SQRT_HALF)))
    out = jnp.dot(gated.astype(normed.dtype), weight_out[...], preferred_element_type=jnp.float32)
    out_ref[...] = (x + out + bias_out[...]).astype(out_ref.dtype)
