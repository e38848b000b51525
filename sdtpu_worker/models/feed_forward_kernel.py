"""The dense layers of a transformer block as one kernel on a TPU: what lies between them never leaves the chip."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_SQRT_HALF = 0.5**0.5


def gated_feed_forward(
    x: jax.Array,
    weight_in: jax.Array,
    bias_in: jax.Array,
    weight_out: jax.Array,
    bias_out: jax.Array,
    *,
    block_rows: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `(values · gelu(gates)) @ weight_out + bias_out`, where `x @ weight_in + bias_in` is values beside gates.

    Between the two products everything is float32, but the operand of the second one.

    Args:
        x: `(B, L, C)`.
        weight_in: `(C, 2 · I)`.
        bias_in: `(2 · I,)`.
        weight_out: `(I, C)`.
        bias_out: `(C,)`.
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

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0, 0))

    block = pl.BlockSpec((block_rows, features), lambda i: (i, 0))
    fixed = [weight_in, bias_in.astype(jnp.float32)[None], weight_out, bias_out.astype(jnp.float32)[None]]
    out: jax.Array = pl.pallas_call(
        partial(_kernel, inner=inner),
        grid=(rows // block_rows,),
        in_specs=[block, *map(whole, fixed)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=100 * 2**20),
        interpret=interpret,
        name="gated_feed_forward",
    )(flat, *fixed)
    return out[:wanted_rows].reshape(x.shape)


def _kernel(
    x_ref: Any, weight_in: Any, bias_in: Any, weight_out: Any, bias_out: Any, out_ref: Any, *, inner: int
) -> None:
    x = x_ref[...]

    def product(columns: slice) -> jax.Array:
        found = jnp.dot(x, weight_in[:, columns], preferred_element_type=jnp.float32)
        return found + bias_in[:, columns]

    values, gates = product(slice(0, inner)), product(slice(inner, 2 * inner))
    gated = values * (0.5 * gates * (1 + jax.lax.erf(gates * _SQRT_HALF)))
    out = jnp.dot(gated.astype(x.dtype), weight_out[...], preferred_element_type=jnp.float32)
    out_ref[...] = (out + bias_out[...]).astype(out_ref.dtype)
