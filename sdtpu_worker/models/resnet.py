"""Residual blocks and the changes of resolution between them, for UNets and autoencoders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear, resize_nearest


class ResnetBlock(nnx.Module):
    """Two convolutions beside a shortcut; in a UNet the time embedding goes in between them.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        groups: of the norms.
        eps: of the norms.
        act_fn: a key of `ACTIVATIONS`.
        time_features: of the time embedding; None in an autoencoder.
        scale_shift: the embedding scales and shifts what the second norm gives; otherwise it is added before it.
        output_scale: the sum with the shortcut is divided by it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        act_fn: str,
        time_features: int | None = None,
        scale_shift: bool = False,
        output_scale: float = 1.0,
    ) -> None:
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv(in_channels, out_channels)
        time_outputs = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = None if time_features is None else Linear(time_features, time_outputs)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else Conv(in_channels, out_channels, kernel=1, padding=0)
        self.activation = ACTIVATIONS[act_fn]
        self.scale_shift = scale_shift
        self.output_scale = output_scale

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """Map `x (B, h, w, in)` and the embedding `time (B, time_features)` to `(B, h, w, out)`."""
        y = self.conv1(self.activation(self.norm1(x)))
        if self.time_emb_proj is None:
            y = self.norm2(y)
        else:
            shift = self.time_emb_proj(self.activation(time))[:, None, None]  # (B, 1, 1, C), or twice as many
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                y = self.norm2(y) * (1 + scale) + shift
            else:
                y = self.norm2(y + shift)
        y = self.conv2(self.activation(y))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (shortcut + y) / self.output_scale


class Downsample(nnx.Module):
    """Halve height and width by a convolution.

    Args:
        channels: of input and output.
        padding: zeros around the image; with 0, one row below and one column on the right.
    """

    def __init__(self, channels: int, padding: int) -> None:
        self.conv = Conv(channels, channels, stride=2, padding=padding or ((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to about `(B, h / 2, w / 2, C)`."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Enlarge an image by repeating pixels, then smooth it by a convolution."""

    def __init__(self, channels: int) -> None:
        self.conv = Conv(channels, channels)

    def __call__(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """Map `(B, h, w, C)` to `(B, height, width, C)`."""
        return self.conv(resize_nearest(x, height, width))
