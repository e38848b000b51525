"""Attention: the one seam that every model goes through, and diffusers' layer around it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import Linear


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False, with_lse: bool = False) -> Any:
    """Return scaled dot-product attention.

    Scores and softmax are float32 whatever the inputs: a bfloat16 score of 30 is off by up to 0.06, and the exponential
    makes that 6 % of the weight.

    Args:
        q: queries `(B, Lq, heads, dim)`.
        k: keys `(B, Lk, heads, dim)`.
        v: values `(B, Lk, heads, dim)`.
        causal: position i sees positions up to i only.
        with_lse: also return the logarithms of the sums of exponentials, for `merge_attentions`.

    Returns:
        `(B, Lq, heads, dim)` in the dtype of `v`; with `with_lse` also `(B, Lq, heads, 1) float32`.

    Source: Vaswani et al. 2017, equation 1.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
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
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](merge_heads(attention(q, k, v)))
