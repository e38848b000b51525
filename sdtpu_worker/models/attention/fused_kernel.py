"""Attention with its norm, its projections and its shortcut as one kernel on a TPU.

The image is read and written once; only keys and values come from a product before it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.attention.tpu_kernel import Packing, attend_group
from sdtpu_worker.models.vector_memory import vector_memory


def fused_attention(
    x: jax.Array,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    weight_q: jax.Array,
    keys_values: jax.Array,
    weight_out: jax.Array,
    bias_out: jax.Array,
    packing: Packing,
    *,
    eps: float,
    num_keys: int,
    block_queries: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `x + attention(norm(x) @ weight_q, keys, values) @ weight_out + bias_out`.

    Args:
        x: `(B, Lq, C)`.
        norm_weight, norm_bias: `(C,)`, of the norm over the last axis.
        weight_q: `(C, width)`, with packed columns.
        keys_values: `(B, Lk, 2 · width)`, packed keys beside packed values, these with `Packing.ones` added.
        weight_out: `(width, C)`, with packed rows.
        bias_out: `(C,)`.
        packing: of the heads.
        eps: of the norm.
        num_keys: how many of the keys count; the rest is there to fill the tiles.
        block_queries: how many queries one step of the kernel takes; divides Lq.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, Lq, C)` in the dtype of `x`.

    Raises:
        ValueError: the blocks do not divide the queries; a kernel would leave the rest as it was, without a word.
    """
    batch, num_queries, features = x.shape
    if num_queries % block_queries:
        raise ValueError(f"block_queries must divide the {num_queries} queries, got {block_queries}")

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda b, i: (0, 0))

    key_rows = keys_values.shape[1]
    blocks = [((block_queries, features), x.dtype)] * 2 + [((key_rows, 2 * packing.width), x.dtype)]
    blocks += [(each.shape, x.dtype) for each in (weight_q, weight_out)]
    memory = vector_memory(blocks, block_queries * max(key_rows, packing.width))
    block = pl.BlockSpec((1, block_queries, features), lambda b, i: (b, i, 0))
    weight, bias, bias_of_out = (each.astype(jnp.float32)[None] for each in (norm_weight, norm_bias, bias_out))
    out: jax.Array = pl.pallas_call(
        partial(_kernel, packing=packing, num_keys=num_keys, eps=eps),
        grid=(batch, num_queries // block_queries),
        in_specs=[
            block,
            whole(weight),
            whole(bias),
            whole(weight_q),
            pl.BlockSpec((1, *keys_values.shape[1:]), lambda b, i: (b, 0, 0)),
            whole(weight_out),
            whole(bias_of_out),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        interpret=interpret,
        name="fused_attention",
    )(x, weight, bias, weight_q, keys_values, weight_out, bias_of_out)
    return out


def _kernel(
    x_ref: Any,
    norm_weight: Any,
    norm_bias: Any,
    weight_q: Any,
    kv_ref: Any,
    weight_out: Any,
    bias_out: Any,
    out_ref: Any,
    *,
    packing: Packing,
    num_keys: int,
    eps: float,
) -> None:
    """Do it for a block of queries; all heads stand in straight code, see `tpu_kernel`."""
    x = x_ref[0].astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    normed = (unit * norm_weight[...] + norm_bias[...]).astype(x_ref.dtype)
    queries = jnp.dot(normed, weight_q[...], preferred_element_type=jnp.float32).astype(x_ref.dtype)
    out = x + bias_out[...]
    for group in range(packing.groups):
        lanes = slice(group * packing.lanes, (group + 1) * packing.lanes)
        lanes_of_values = slice(packing.width + lanes.start, packing.width + lanes.stop)
        heads = packing.heads_of_last if group == packing.groups - 1 else packing.heads_per_group
        (found,) = attend_group(
            queries[:, lanes], kv_ref[0, :, lanes], kv_ref[0, :, lanes_of_values], packing, num_keys, heads
        )
        out += jnp.dot(found.astype(x_ref.dtype), weight_out[lanes, :], preferred_element_type=jnp.float32)
    out_ref[0] = out.astype(out_ref.dtype)
