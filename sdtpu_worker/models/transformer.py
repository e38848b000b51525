"""The transformer between a UNet's residual blocks: pixels attend to each other, then to the prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention import Attention
from sdtpu_worker.models.convolution import Measured, measure, projection_block
from sdtpu_worker.models.feed_forward_kernel import gated_feed_forward
from sdtpu_worker.models.layers import Conv, GroupNorm, LayerNorm, Linear, Nothing, gelu
from sdtpu_worker.models.projection_kernel import project_from_image, project_to_image
from sdtpu_worker.models.prompt_windows import Context, add_attention_to_prompt
from sdtpu_worker.models.row_projection_kernel import project_rows_from_image, project_rows_to_image
from sdtpu_worker.models.selection import current_selection
from sdtpu_worker.models.sums_kernel import batch_in_sublanes

_GROUP_NORM_EPS = 1e-6  # here always, whatever the config's `norm_eps`, which is of the residual blocks


class GatedGelu(nnx.Module):
    """A dense layer whose second half gates the first, through the exact GELU."""

    def __init__(self, features: int, inner_features: int) -> None:
        self.proj = Linear(features, 2 * inner_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, L, features)` to `(B, L, inner_features)`."""
        values, gates = jnp.split(self.proj(x), 2, axis=-1)
        return values * gelu(gates)


class FeedForward(nnx.Module):
    """The dense layers of a transformer block, four times as wide inside."""

    def __init__(self, features: int) -> None:
        self.net = nnx.List([GatedGelu(features, 4 * features), Nothing(), Linear(4 * features, features)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, L, features)` to the same shape."""
        for layer in self.net:
            x = layer(x)
        return x

    def beside_shortcut(self, x: jax.Array, norm: LayerNorm) -> jax.Array:
        """Return `x (B, L, features)` with what the layers make of its norm added; on a TPU perhaps by one kernel."""
        first, last, selection = self.net[0].proj, self.net[2], current_selection()
        sizes = selection.platform, selection.wanted, x.shape[1], x.shape[2], x.dtype
        block_rows = selection.dense_block_rows(*sizes)
        if not block_rows or first.adapter is not None or last.adapter is not None:
            return x + self(norm(x))
        parts = (leaf[...] for leaf in (norm.weight, norm.bias, first.weight, first.bias, last.weight, last.bias))
        return gated_feed_forward(x, *parts, eps=norm.eps, block_rows=block_rows, interpret=selection.interpret)


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the prompt, dense layers; each after a norm and beside a shortcut.

    Args:
        features: of the pixels.
        context_features: of the prompt's encoding.
        heads: of both attentions.
        only_cross_attention: the first attention looks at the prompt too.
    """

    def __init__(self, features: int, context_features: int, heads: int, only_cross_attention: bool) -> None:
        self.norm1 = LayerNorm(features)
        self.attn1 = Attention(features, context_features if only_cross_attention else features, heads)
        self.norm2 = LayerNorm(features)
        self.attn2 = Attention(features, context_features, heads)
        self.norm3 = LayerNorm(features)
        self.ff = FeedForward(features)
        self.only_cross_attention = only_cross_attention

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Map `x (B, h · w, features)` with `context (B, L, context_features)` to the shape of `x`."""
        if self.only_cross_attention:
            x = add_attention_to_prompt(self.attn1, x, self.norm1, context)
        else:
            x = self.attn1.beside_shortcut(x, self.norm1)
        x = add_attention_to_prompt(self.attn2, x, self.norm2, context)
        return self.ff.beside_shortcut(x, self.norm3)


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of an image.

    Args:
        channels: of the image.
        context_features: of the prompt's encoding.
        heads: of each attention.
        num_blocks: how many blocks.
        groups: of the norm.
        linear_projection: the projections around the blocks are dense layers; otherwise convolutions of 1 × 1.
        only_cross_attention: see `TransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        context_features: int,
        heads: int,
        num_blocks: int,
        groups: int,
        linear_projection: bool,
        only_cross_attention: bool,
    ) -> None:
        def projection() -> Linear | Conv:
            return Linear(channels, channels) if linear_projection else Conv(channels, channels, kernel=1, padding=0)

        self.norm = GroupNorm(groups, channels, _GROUP_NORM_EPS)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, context_features, heads, only_cross_attention) for _ in range(num_blocks)]
        )
        self.proj_out = projection()

    def __call__(self, x: Measured, context: Context) -> Measured:
        """Map `x (B, h, w, C)` with `context (B, L, context_features)` to the shape of `x`."""
        y = self._enter(x)
        for block in self.transformer_blocks:
            y = block(y, context)
        return self._beside_shortcut(y, x.image)

    def _enter(self, x: Measured) -> jax.Array:
        """Return the first projection of the norm of an image, `(B, h · w, C)`; on a TPU perhaps by one kernel."""
        batch, height, width, channels = x.image.shape
        layer, block = self.proj_in, _block_pixels(self.proj_in, x.image)
        if block and x.sums is not None and layer.bias is not None:
            weight, interpret = layer.weight[...].reshape(channels, channels), current_selection().interpret
            project = project_from_image if batch_in_sublanes(batch) else project_rows_from_image
            return project(x.image, x.affine(self.norm), weight, layer.bias[...], block, interpret=interpret)
        # A dense layer over the last axis is a convolution of 1 × 1, so that both take the image as it is.
        return layer(x.normalised(self.norm)).reshape(batch, height * width, channels)

    def _beside_shortcut(self, y: jax.Array, image: jax.Array) -> Measured:
        """Return an image with the last projection of `y (B, h · w, C)` added; on a TPU perhaps by one kernel."""
        layer, block = self.proj_out, _block_pixels(self.proj_out, image)
        if not block or layer.bias is None:
            return measure(image + layer(y.reshape(image.shape)))
        weight, interpret = layer.weight[...].reshape(2 * image.shape[-1:]), current_selection().interpret
        project = project_to_image if batch_in_sublanes(len(image)) else project_rows_to_image
        return Measured(*project(y, weight, layer.bias[...], image, block, interpret=interpret))


def _block_pixels(layer: Linear | Conv, image: jax.Array) -> int:
    """Return the pixels that a step of the kernel of a projection takes; 0 where there is no kernel for it."""
    return 0 if layer.adapter is not None else projection_block(image)
