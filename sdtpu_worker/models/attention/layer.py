"""diffusers' layer around an attention: four projections, and between them whatever the table chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from sdtpu_worker.models.projection_kernel import normalise_and_project
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

    def __call__(self, x: jax.Array, context: jax.Array, counts: jax.Array | None = None) -> jax.Array:
        """Map `x (B, L, features)` to the same shape.

        Args:
            x: what attends.
            context: `(B, Lk, context_features)`, what is attended to; the array `x` itself for its own input.
            counts: `(B,) int32`, how many tokens of the context count in each row; None for all.
        """
        choice, packing = self._choose(x, context)
        if choice.implementation is Implementation.PACKED:
            return self._packed(x, context, counts, replace(packing, is_even=True), choice)
        width = self.to_k.weight.shape[1]
        keys, values = (
            project(context) if counts is None else _in_parts(project, context, width)
            for project in (self.to_k, self.to_v)
        )
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), keys, values))
        if choice.implementation is Implementation.CUDNN and counts is None:
            y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            y = attention(q, k, v, counts=counts)
        return self.to_out[0](merge_heads(y))

    def beside_shortcut(
        self, x: jax.Array, norm: LayerNorm, context: jax.Array | None = None, counts: jax.Array | None = None
    ) -> jax.Array:
        """Return `x` with the attention of its norm added; on a TPU perhaps by one kernel.

        Args:
            x: `(B, L, features)`.
            norm: of the features.
            context: `(B, Lk, context_features)`; None to attend to the norm itself.
            counts: `(B,) int32`, how many tokens of the context count in each row; None for all.
        """
        choice, packing = self._choose(x, x if context is None else context)
        is_plain = self.to_q.adapter is None and self.to_out[0].adapter is None and self.to_q.bias is None
        if choice.fuses and is_plain:
            return self._fused(x, norm, context, counts, packing, choice)
        y = norm(x)
        return x + self(y, y if context is None else context, counts)

    def counts_keys(self, x: jax.Array, num_keys: int) -> bool:
        """Return whether the layer is to be given all keys that a row may have, with how many of them count."""
        return current_selection().counts_keys(self._shape(x, num_keys))

    def _choose(self, x: jax.Array, context: jax.Array) -> tuple[Choice, Packing]:
        shape = self._shape(x, context.shape[1])
        return current_selection().choose(shape), Packing(self.heads, shape.dim)

    def _shape(self, x: jax.Array, num_keys: int) -> Shape:
        dim = self.to_out[0].weight.shape[0] // self.heads
        return Shape(x.shape[1], num_keys, self.heads, dim, dtype_name(x.dtype))

    def _fused(
        self,
        x: jax.Array,
        norm: LayerNorm,
        context: jax.Array | None,
        counts: jax.Array | None,
        packing: Packing,
        choice: Choice,
    ) -> jax.Array:
        """Do what `beside_shortcut` does by one kernel, and a product for keys and values before it."""
        num_keys: int | jax.Array
        if context is None:
            if packing.ones_lane is None:  # of many keys the sums of weights are dear, and a lane of ones has them made
                packing = replace(packing, is_even=True)
            both = _fill(self._own_keys_values(x, norm, packing), LANES)
            keys, values, num_keys = both, both, x.shape[1]
        else:
            keys, values, num_keys = self._keys_values(context, counts, packing)
        back, block = self.to_out[0], block_of_queries(x.shape[1], choice.block_queries)
        return fused_attention(
            _fill(x, block),
            norm.weight[...],
            norm.bias[...],
            packing.pack(self.to_q.weight[...].astype(x.dtype)),
            keys,
            values,
            packing.pack(back.weight[...].astype(x.dtype), axis=-2),
            back.bias[...],
            packing,
            eps=norm.eps,
            num_keys=num_keys,
            block_queries=block,
            interpret=current_selection().interpret,
        )[:, : x.shape[1]]

    def _own_keys_values(self, x: jax.Array, norm: LayerNorm, packing: Packing) -> jax.Array:
        """Return packed keys beside packed values of the norm of `x`, `(B, L, 2 · width)`; perhaps by one kernel."""
        layers, ones, selection = [self.to_k, self.to_v], packing.ones(x.dtype), current_selection()
        block_rows = selection.key_block_rows(selection.platform, selection.wanted, x.shape, x.dtype)
        if not block_rows or not all(layer.adapter is None and layer.bias is None for layer in layers):
            return _project(norm(x), layers, packing, ones)
        weight = jnp.concatenate([packing.pack(layer.weight[...].astype(x.dtype)) for layer in layers], axis=-1)
        bias = jnp.concatenate([jnp.zeros_like(ones), ones])
        parts = norm.weight[...], norm.bias[...], weight, bias
        return normalise_and_project(x, *parts, eps=norm.eps, block_rows=block_rows, interpret=selection.interpret)

    def _keys_values(
        self, context: jax.Array, counts: jax.Array | None, packing: Packing
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return packed keys and packed values of a prompt, and how many count in each row.

        They come from products alone, with nothing filled up or added, so that XLA takes them out of the loop over
        steps; the kernels do the rest.
        """
        if counts is None:
            counts = jnp.full(len(context), context.shape[1], jnp.int32)
        projects = (partial(_project, layers=[layer], packing=packing) for layer in (self.to_k, self.to_v))
        keys, values = (_in_parts(project, context, packing.width) for project in projects)
        return keys, values, counts

    def _packed(
        self, x: jax.Array, context: jax.Array, counts: jax.Array | None, packing: Packing, choice: Choice
    ) -> jax.Array:
        """Do the same with packed heads: projections from packed weights, without a transposition in between."""
        num_queries, groups = x.shape[1], packing.groups
        block = block_of_queries(num_queries, choice.block_queries)
        attend = partial(
            packed_attention, packing=packing, block_queries=block, interpret=current_selection().interpret
        )
        rows = _fill(x, block)
        if context is x:
            # One product for all three, whose result the kernel reads in three places.
            all_three = _project(rows, [self.to_q, self.to_k, self.to_v], packing, packing.ones(x.dtype))
            y = attend(all_three, all_three, all_three, num_keys=num_queries, offsets=(0, groups, 2 * groups))
        else:
            keys, values, num_keys = self._keys_values(context, counts, packing)
            y = attend(_project(rows, [self.to_q], packing), keys, values, num_keys=num_keys)
        return _project_back(y, self.to_out[0], packing)[:, :num_queries]


def block_of_queries(num_queries: int, most: int) -> int:
    """Return how many queries a step of the kernel takes.

    Args:
        num_queries: of a row; filled up to whole steps where the result does not divide them.
        most: of a step. A number that divides the queries, down to half of it, is preferred to the fewest steps.
    """
    dividing = [size for size in range(_SUBLANES, most + 1, _SUBLANES) if num_queries % size == 0]
    if dividing and 2 * dividing[-1] >= min(most, num_queries):
        return dividing[-1]
    steps = -(-num_queries // most)
    return -(-num_queries // (steps * _SUBLANES)) * _SUBLANES


def _fill(x: jax.Array, multiple: int) -> jax.Array:
    """Return `(B, L, …)` with zeros behind, so that L is a multiple."""
    spare = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, spare), (0, 0))) if spare else x


def _in_parts(project: Callable[[jax.Array], jax.Array], context: jax.Array, width: int) -> jax.Array:
    """Return what a product makes of prompts, from as many products as XLA takes out of the loop over steps.

    It leaves those inside whose result is larger than all that they are made of.

    Args:
        project: makes `(B, L, width)` of `(B, L, E)`, each token by itself.
        context: `(B, L, E)`.
        width: of the result.
    """
    batch, length, features = context.shape
    most = length if width <= features else max(1, features * width // (batch * (width - features)))
    parts = [project(context[:, start : start + most]) for start in range(0, length, most)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


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
