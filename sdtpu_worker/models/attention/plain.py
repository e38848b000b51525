"""Attention as the textbook has it, for any platform: XLA compiles it as it likes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool = False,
    with_lse: bool = False,
    counts: jax.Array | None = None,
) -> Any:
    """Return scaled dot-product attention.

    Scores and softmax are float32 whatever the inputs: a bfloat16 score of 30 is off by up to 0.06, and the exponential
    makes that 6 % of the weight.

    Args:
        q: queries `(B, Lq, heads, dim)`.
        k: keys `(B, Lk, heads, dim)`.
        v: values `(B, Lk, heads, dim)`.
        causal: position i sees positions up to i only.
        counts: `(B,) int32`, how many of the keys each row sees, at least 1; None for all.
        with_lse: also return the logarithms of the sums of exponentials, for `merge_attentions`.

    Returns:
        `(B, Lq, heads, dim)` in the dtype of `v`; with `with_lse` also `(B, Lq, heads, 1) float32`.

    Source: Vaswani et al. 2017, equation 1.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    if counts is not None:
        counted = jnp.arange(k.shape[1]) < counts[:, None, None, None]
        scores = jnp.where(counted, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    if not with_lse:
        return out
    return out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)[..., None]


def merge_attentions(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> Any:
    """Return the attention to two sets of keys at once, from the attention to each.

    Args:
        first: what an attention returned, with the logarithms of its sums of exponentials.
        second: likewise of the same queries and other keys; logarithms of minus infinity count for nothing.

    Returns:
        Both for the two sets together, so that a third can be added.
    """
    (out_1, lse_1), (out_2, lse_2) = first, second
    both = jnp.logaddexp(lse_1, lse_2)
    out = out_1.astype(jnp.float32) * jnp.exp(lse_1 - both) + out_2.astype(jnp.float32) * jnp.exp(lse_2 - both)
    return out.astype(out_1.dtype), both


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Return `(B, L, heads · dim)` as `(B, L, heads, dim)`."""
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """Return `(B, L, heads, dim)` as `(B, L, heads · dim)`."""
    return x.reshape(*x.shape[:2], -1)
