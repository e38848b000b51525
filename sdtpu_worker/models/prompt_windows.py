"""Prompts that are longer than a text encoder's window: what the pixels attend to, and how.

A prompt is encoded window by window, and the pixels attend to all windows of their own row at once. A row with one
window has the same pixels whatever its neighbours have, in one of two ways; `kernel_table` says which. On a TPU a layer
is given the windows of all rows, with how many of them count. Elsewhere the first window is attended to outside every
condition, and the others only on a device that has a row with several.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from sdtpu_worker.models.attention import Attention, attention, merge_attentions, merge_heads, split_heads
from sdtpu_worker.models.layers import LayerNorm

WINDOWS = "windows"
"""The name of what only a prompt of several windows costs in the compiled program, for `sdtpu plan`."""


class PromptWindows(NamedTuple):
    """Encoded prompts in several windows; W the most that a row can have.

    Attributes:
        first: `(B, L, E)`, the first window of every row.
        further: `(B, W - 1, L, E)`, those after it; whatever lies beyond a row's own is ignored.
        counts: `(B,) int32`, the windows of every row, 1 to W; 0 in a slot that never had a job is as 1.
    """

    first: jax.Array
    further: jax.Array
    counts: jax.Array


Context: TypeAlias = jax.Array | PromptWindows
"""What the pixels attend to: encoded prompts `(B, L, E)`, or such in several windows."""


def cast_context(context: Context, dtype: Any) -> Context:
    """Return encoded prompts in a dtype."""
    if isinstance(context, PromptWindows):
        return PromptWindows(context.first.astype(dtype), context.further.astype(dtype), context.counts)
    return context.astype(dtype)


def add_attention_to_prompt(layer: Attention, x: jax.Array, norm: LayerNorm, context: Context) -> jax.Array:
    """Return `x (B, Lq, features)` with a layer's attention from its norm to all windows of each row's prompt added.

    A row with one window has what the layer makes of that, bit for bit, by whatever kernel the layer chooses.
    """
    if not isinstance(context, PromptWindows):
        return layer.beside_shortcut(x, norm, context)
    batch, further, length, width = context.further.shape
    most = (1 + further) * length
    if layer.counts_keys(x, most):
        windows = jnp.concatenate([context.first[:, None], context.further], axis=1)
        counts = length * jnp.maximum(context.counts, 1)
        return layer.beside_shortcut(x, norm, windows.reshape(batch, most, width), counts)
    with_first = layer.beside_shortcut(x, norm, context.first)
    is_long = context.counts > 1

    def look_at_all() -> jax.Array:
        with_all: jax.Array = x + _attend_to_all(layer, norm(x), context)
        return with_all

    with jax.named_scope(WINDOWS):
        with_all = jax.lax.cond(is_long.any(), look_at_all, lambda: jnp.zeros_like(x))
    return jnp.where(is_long[:, None, None], with_all, with_first)


def _attend_to_all(layer: Attention, x: jax.Array, context: PromptWindows) -> jax.Array:
    """Return a layer's output for all windows, one after the other, as many as the longest row has."""
    queries = split_heads(layer.to_q(x), layer.heads)
    windows = jnp.concatenate([context.first[:, None], context.further], axis=1)

    def add(number: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        window = jax.lax.dynamic_index_in_dim(windows, number, axis=1, keepdims=False)
        keys, values = (split_heads(project(window), layer.heads) for project in (layer.to_k, layer.to_v))
        out, sums = attention(queries, keys, values, with_lse=True)
        is_there = (number == 0) | (number < context.counts)
        merged: tuple[jax.Array, jax.Array] = merge_attentions(
            before, (out, jnp.where(is_there[:, None, None, None], sums, -jnp.inf))
        )
        return merged

    nothing = jnp.zeros(queries.shape, jnp.float32), jnp.full((*queries.shape[:-1], 1), -jnp.inf, jnp.float32)
    out, _ = jax.lax.fori_loop(0, context.counts.max(), add, nothing)
    return layer.to_out[0](merge_heads(out.astype(x.dtype)))
