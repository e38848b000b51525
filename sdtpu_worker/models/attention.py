"""The one place where queries meet keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import Linear


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return the values, averaged by how well their keys fit the queries.

    Args:
        query: `(B, L, heads, width)`.
        key, value: `(B, M, heads, width)`.
        mask: added to the scores, `(L, M) float32`.

    Returns:
        `(B, L, heads, width)` in the query's dtype.
    """
    scores = jnp.einsum("blhd,bmhd->bhlm", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    # The softmax sums up thousands of small numbers: float32, whatever the rest is.
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)


class Attention(nnx.Module):
    """Attention as diffusers' blocks have it: three projections in, one out.

    Args:
        channels: of the input and the output.
        heads: how many.
        context: channels of what keys and values are made of; None for the input itself.
        bias: of the projections of query, key and value.
    """

    def __init__(self, channels: int, heads: int, context: int | None = None, bias: bool = False) -> None:
        context = channels if context is None else context
        self.to_q = Linear(channels, channels, bias)
        self.to_k = Linear(context, channels, bias)
        self.to_v = Linear(context, channels, bias)
        self.to_out = nnx.List([Linear(channels, channels)])
        self._heads = heads

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Return an array like `x`, `(B, L, channels)`.

        Args:
            x: queries are made of it.
            context: `(B, M, …)`; None for `x`.
        """
        context = x if context is None else context
        query, key, value = (
            part.reshape(*part.shape[:2], self._heads, -1)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(query, key, value).reshape(x.shape))
