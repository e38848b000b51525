"""diffusers' layer around an attention: four projections, and between them whatever the table chose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention.fused_kernel import fused_attention
from sdtpu_worker.models.attention.plain import attention, merge_heads, split_heads
from sdtpu_worker.models.attention.tpu_kernel import LANES, Packing, packed_attention
from sdtpu_worker.models.kernel_table import Choice, Implementation, Shape, dtype_name
from sdtpu_worker.models.layers import LayerNorm, Linear, adapter_change
from sdtpu_worker.models.selection import current_selection

_SUBLANES = 16  # of a tile of bfloat16


class Attention(nnx.Module):
    """Attention with its four projections, under the names of diffusers' UNets and autoencoders.

    Args:
        features: of the queries and of the output.
        context_features: of what is attended to.
        heads: how many.
        bias: whether the projections of queries, keys and values have one.
    """

    def __init__(self, features: int, context_features: int, heads: int, bias: bool = False) -> None:
        self.to_q = Linear(features, features, bias)
        self.to_k = Linear(context_features, features, bias)
        self.to_v = Linear(context_features, features, bias)
        self.to_out = nnx.List([Linear(features, features)])
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Map `x (B, L, features)`, attending to `context (B, Lk, context_features)`, to the shape of `x`."""
        choice, packing = self._choose(x, context)
        if choice.implementation is Implementation.PACKED:
            return self._packed(x, context, packing, choice)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if choice.implementation is Implementation.CUDNN:
            y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            y = attention(q, k, v)
        return self.to_out[0](merge_heads(y))

    def beside_shortcut(self, x: jax.Array, norm: LayerNorm, context: jax.Array | None = None) -> jax.Array:
        """Return `x` with the attention of its norm added; on a TPU perhaps by one kernel.

        Args:
            x: `(B, L, features)`.
            norm: of the features.
            context: `(B, Lk, context_features)`; None to attend to the norm itself.
        """
        choice, packing = self._choose(x, x if context is None else context)
        is_plain = self.to_q.adapter is None and self.to_out[0].adapter is None and self.to_q.bias is None
        if choice.fuses and is_plain:
            return self._fused(x, norm, context, packing, choice)
        y = norm(x)
        return x + self(y, y if context is None else context)

    def _choose(self, x: jax.Array, context: jax.Array) -> tuple[Choice, Packing]:
        dim = self.to_out[0].weight.shape[0] // self.heads
        shape = Shape(x.shape[1], context.shape[1], self.heads, dim, dtype_name(x.dtype))
        return current_selection().choose(shape), Packing(self.heads, dim)

    def _fused(
        self, x: jax.Array, norm: LayerNorm, context: jax.Array | None, packing: Packing, choice: Choice
    ) -> jax.Array:
        """Do what `beside_shortcut` does by one kernel, and a product for keys and values before it."""
        context = norm(x) if context is None else context
        both = _fill(_project(context, [self.to_k, self.to_v], packing, packing.ones(x.dtype)), LANES)
        back, block = self.to_out[0], _block(x.shape[1], choice.block_queries)
        return fused_attention(
            _fill(x, block),
            norm.weight[...],
            norm.bias[...],
            packing.pack(self.to_q.weight[...].astype(x.dtype)),
            both,
            packing.pack(back.weight[...].astype(x.dtype), axis=-2),
            back.bias[...],
            packing,
            eps=norm.eps,
            num_keys=context.shape[1],
            block_queries=block,
            interpret=current_selection().interpret,
        )[:, : x.shape[1]]

    def _packed(self, x: jax.Array, context: jax.Array, packing: Packing, choice: Choice) -> jax.Array:
        """Do the same with packed heads: projections from packed weights, without a transposition in between."""
        num_queries, groups = x.shape[1], packing.groups
        block = _block(num_queries, choice.block_queries)
        ones = packing.ones(x.dtype)
        attend = partial(
            packed_attention,
            packing=packing,
            num_keys=context.shape[1],
            block_queries=block,
            interpret=current_selection().interpret,
        )
        rows = _fill(x, block)
        if context is x:
            # One product for all three, whose result the kernel reads in three places.
            all_three = _project(rows, [self.to_q, self.to_k, self.to_v], packing, ones)
            y = attend(all_three, all_three, all_three, offsets=(0, groups, 2 * groups))
        else:
            both = _fill(_project(context, [self.to_k, self.to_v], packing, ones), LANES)
            y = attend(_project(rows, [self.to_q], packing), both, both, offsets=(0, 0, groups))
        return _project_back(y, self.to_out[0], packing)[:, :num_queries]


def _block(num_queries: int, most: int) -> int:
    """Return how many queries a step of the kernel takes: as few steps as the most allow, and little to fill up."""
    steps = -(-num_queries // most)
    return -(-num_queries // (steps * _SUBLANES)) * _SUBLANES


def _fill(x: jax.Array, multiple: int) -> jax.Array:
    """Return `(B, L, …)` with zeros behind, so that L is a multiple."""
    spare = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, spare), (0, 0))) if spare else x


def _project(x: jax.Array, layers: Sequence[Linear], packing: Packing, last_bias: jax.Array | None = None) -> jax.Array:
    """Return what several layers make of the same input, packed and beside each other.

    Args:
        x: `(B, L, in)`.
        layers: of the same input.
        packing: of what they make.
        last_bias: `(width,)`, added to what the last layer makes.

    Returns:
        `(B, L, layers · width)`.
    """
    weight = jnp.concatenate([packing.pack(layer.weight[...].astype(x.dtype)) for layer in layers], axis=-1)
    biases = [None if layer.bias is None else packing.pack(layer.bias[...].astype(x.dtype)) for layer in layers]
    if last_bias is not None:
        biases[-1] = last_bias if biases[-1] is None else biases[-1] + last_bias
    changes = []
    for layer in layers:
        down_up = layer.adapter
        changes.append(down_up and adapter_change(x, (down_up[0], packing.pack(down_up[1]))))
    return x @ weight + _beside(biases) + _beside(changes)


def _beside(parts: Sequence[jax.Array | None]) -> Any:
    """Return arrays of one shape beside each other, zeros for those that are missing; 0 where all are."""
    there = next((part for part in parts if part is not None), None)
    if there is None:
        return 0
    return jnp.concatenate([jnp.zeros_like(there) if part is None else part for part in parts], axis=-1)


def _project_back(y: jax.Array, layer: Linear, packing: Packing) -> jax.Array:
    """Return what a layer makes of packed heads, `(B, L, width)`."""
    pack_rows = partial(packing.pack, axis=-2)
    out = y @ pack_rows(layer.weight[...].astype(y.dtype))
    if layer.bias is not None:
        out = out + layer.bias[...].astype(y.dtype)
    if layer.adapter is None:
        return out
    down, up = layer.adapter
    return out + adapter_change(y, (pack_rows(down), up))
