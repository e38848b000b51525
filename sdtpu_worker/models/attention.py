"""Attention: the one seam that every model goes through, and diffusers' layer around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import Linear


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """Return scaled dot-product attention.

    Scores and softmax are float32 whatever the inputs: a bfloat16 score of 30 is off by up to 0.06, and the exponential
    makes that 6 % of the weight.

    Args:
        q: queries `(B, Lq, heads, dim)`.
        k: keys `(B, Lk, heads, dim)`.
        v: values `(B, Lk, heads, dim)`.
        causal: position i sees positions up to i only.

    Returns:
        `(B, Lq, heads, dim)` in the dtype of `v`.

    Source: Vaswani et al. 2017, equation 1.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


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
