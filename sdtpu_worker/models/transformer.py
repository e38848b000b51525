"""The transformer between two residual blocks of the UNet: pixels attend to each other, and to the prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention import Attention
from sdtpu_worker.models.layers import Conv, GroupNorm, LayerNorm, Linear, exact_gelu

_EPS = 1e-6


class Transformer2DModel(nnx.Module):
    """Transformer blocks over all pixels, beside the input.

    Args:
        channels: in and out.
        heads: of the attention.
        layers: how many blocks.
        context: channels of the prompt.
        groups: of the norm.
        linear: the projections are linear layers; otherwise convolutions of one pixel, which compute the same.
        only_cross: pixels attend to the prompt in place of each other.
    """

    def __init__(
        self, channels: int, heads: int, layers: int, context: int, groups: int, linear: bool, only_cross: bool
    ) -> None:
        self.norm = GroupNorm(groups, channels, _EPS)
        self.proj_in = Linear(channels, channels) if linear else Conv(channels, channels, 1)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, heads, context, only_cross) for _ in range(layers)]
        )
        self.proj_out = Linear(channels, channels) if linear else Conv(channels, channels, 1)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Return an array like `x`, `(B, h, w, channels)`; the prompt is `(B, L, context)`."""
        rows = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            rows = block(rows, context)
        return x + self.proj_out(rows.reshape(x.shape))


class TransformerBlock(nnx.Module):
    """Attention to each other, attention to the prompt, a feed-forward network: each over a norm, beside the input."""

    def __init__(self, channels: int, heads: int, context: int, only_cross: bool) -> None:
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context if only_cross else None)
        self.attn2 = Attention(channels, heads, context)
        self.ff = FeedForward(channels)
        self._only_cross = only_cross

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Return an array like `x`, `(B, L, channels)`."""
        x = x + self.attn1(self.norm1(x), context if self._only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class FeedForward(nnx.Module):
    """A gated layer four times as wide, and a layer back."""

    def __init__(self, channels: int) -> None:
        # PyTorch has a dropout between the two, which counts in the names.
        self.net = nnx.List([GEGLU(channels, 4 * channels), nnx.List([]), Linear(4 * channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like `x`, `(…, channels)`."""
        return self.net[2](self.net[0](x))


class GEGLU(nnx.Module):
    """A linear layer, one half of which gates the other (arXiv 2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.proj = Linear(inputs, 2 * outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(…, outputs)` of `(…, inputs)`."""
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * exact_gelu(gate)
