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

from sdtpu_worker.models.attention.tpu_kernel import (
    LANES,
    OF_WINDOWS,
    Packing,
    attend_group,
    by_count,
    counting_values,
    usual_keys,
    whole_tiles,
)
from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.layers import normalise
from sdtpu_worker.models.vector_memory import vector_memory


def fused_attention(
    x: jax.Array,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    weight_q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    weight_out: jax.Array,
    bias_out: jax.Array,
    packing: Packing,
    *,
    eps: float,
    num_keys: int | jax.Array,
    block_queries: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `x + attention(norm(x) @ weight_q, keys, values) @ weight_out + bias_out`.

    Args:
        x: `(B, Lq, C)`.
        norm_weight, norm_bias: `(C,)`, of the norm over the last axis.
        weight_q: `(C, width)`, with packed columns.
        keys: `(B, Lk, …)`, whose first `width` lanes are the packed keys.
        values: `(B, Lk, …)`, whose last `width` lanes are the packed values, with `Packing.ones` added where `num_keys`
            is a number. May be the same array as the keys.
        weight_out: `(width, C)`, with packed rows.
        bias_out: `(C,)`.
        packing: of the heads.
        eps: of the norm.
        num_keys: how many of the keys count; the rest is there to fill the tiles. Of each row, `(B,) int32`, then Lk
            need not fill tiles; or of all, then it does.
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
        return pl.BlockSpec(array.shape, lambda b, i, *_: (0, 0))

    key_rows, counts = keys.shape[1], list[jax.Array]()
    if isinstance(num_keys, int):
        kernel = partial(_kernel, packing=packing, num_keys=num_keys, eps=eps)
    else:
        key_rows, counts = whole_tiles(key_rows), [num_keys]
        kernel = partial(_kernel_by_row, packing=packing, key_rows=key_rows, eps=eps)
    both = [keys] if keys is values else [keys, values]
    blocks = [((block_queries, features), x.dtype)] * 2 + [((key_rows, 2 * packing.width), x.dtype)]
    blocks += [(each.shape, x.dtype) for each in (weight_q, weight_out)]
    memory = vector_memory(blocks, block_queries * max(key_rows, packing.width))
    block = pl.BlockSpec((1, block_queries, features), lambda b, i, *_: (b, i, 0))
    weight, bias, bias_of_out = (each.astype(jnp.float32)[None] for each in (norm_weight, norm_bias, bias_out))
    scores = batch * packing.heads * num_queries * usual_keys(key_rows, num_keys)
    flops = 2 * batch * num_queries * (weight_q.size + weight_out.size) + 4 * scores * packing.lanes
    out: jax.Array = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(counts),
            grid=(batch, num_queries // block_queries),
            in_specs=[
                block,
                whole(weight),
                whole(bias),
                whole(weight_q),
                *(pl.BlockSpec((1, key_rows, each.shape[2]), lambda b, i, *_: (b, 0, 0)) for each in both),
                whole(weight_out),
                whole(bias_of_out),
            ],
            out_specs=block,
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        cost_estimate=kernel_cost(flops, [x, x, weight_q, *both, weight_out], scores),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        interpret=interpret,
        name="fused_attention" + OF_WINDOWS * (len(counts) > 0 and key_rows > LANES),
    )(*counts, x, weight, bias, weight_q, *both, weight_out, bias_of_out)
    return out


def _kernel_by_row(counts: Any, *refs: Any, packing: Packing, key_rows: int, eps: float) -> None:
    """Do it with the keys that count in the row."""
    count = counts[pl.program_id(0)]
    by_count(count, key_rows, lambda rows: _kernel(*refs, packing=packing, num_keys=count, eps=eps, key_rows=rows))


def _kernel(*refs: Any, packing: Packing, num_keys: int | jax.Array, eps: float, key_rows: int | None = None) -> None:
    """Do it for a block of queries; all heads stand in straight code, see `tpu_kernel`.

    Args:
        refs: as the call has them; keys and values are one or two.
        packing, num_keys, eps: as `fused_attention` has them.
        key_rows: how many of the keys to look at; None for all.
    """
    x_ref, norm_weight, norm_bias, weight_q, *both, weight_out, bias_out, out_ref = refs
    k_ref, v_ref = both[0], both[-1]
    first_of_values = v_ref.shape[2] - packing.width
    x = x_ref[0].astype(jnp.float32)
    normed = normalise(x, norm_weight[...], norm_bias[...], eps).astype(x_ref.dtype)
    queries = jnp.dot(normed, weight_q[...], preferred_element_type=jnp.float32).astype(x_ref.dtype)
    out = x + bias_out[...]
    for group in range(packing.groups):
        lanes = slice(group * packing.lanes, (group + 1) * packing.lanes)
        lanes_of_values = slice(first_of_values + lanes.start, first_of_values + lanes.stop)
        heads = packing.heads_of_last if group == packing.groups - 1 else packing.heads_per_group
        keys, values = k_ref[0, :key_rows, lanes], v_ref[0, :key_rows, lanes_of_values]
        if not isinstance(num_keys, int):
            values = counting_values(values, num_keys, packing)
        (found,) = attend_group(queries[:, lanes], keys, values, packing, num_keys, heads)
        out += jnp.dot(found.astype(x_ref.dtype), weight_out[lanes, :], preferred_element_type=jnp.float32)
    out_ref[0] = out.astype(out_ref.dtype)
