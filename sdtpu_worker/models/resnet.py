"""What the UNet and the autoencoder share: residual blocks, and the ways up and down between resolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear, upsample


class ResnetBlock2D(nnx.Module):
    """Two convolutions, each over a norm and an activation, beside the input.

    Args:
        inputs, outputs: channels.
        groups, eps: of the norms.
        activation: its name.
        time_width: of the time embedding; 0 for a block that has none.
        scale_shift: the time embedding scales and shifts after the second norm, instead of being added before it.
        output_scale: what the sum is divided by.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        eps: float,
        activation: str = "silu",
        time_width: int = 0,
        scale_shift: bool = False,
        output_scale: float = 1.0,
    ) -> None:
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv(inputs, outputs)
        self.time_emb_proj = Linear(time_width, outputs * (1 + scale_shift)) if time_width else None
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.conv2 = Conv(outputs, outputs)
        self.conv_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None
        self._activate, self._scale_shift, self._output_scale = ACTIVATIONS[activation], scale_shift, output_scale

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """Return `(B, h, w, outputs)`.

        Args:
            x: `(B, h, w, inputs)`.
            time: `(B, time_width)`, the time embedding.
        """
        hidden = self.conv1(self._activate(self.norm1(x)))
        told = None
        if self.time_emb_proj is not None and time is not None:
            told = self.time_emb_proj(self._activate(time))[:, None, None]
        if told is not None and not self._scale_shift:
            hidden = hidden + told
        hidden = self.norm2(hidden)
        if told is not None and self._scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            hidden = hidden * (1 + scale) + shift
        hidden = self.conv2(self._activate(hidden))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        total = shortcut + hidden
        return total if self._output_scale == 1.0 else total / self._output_scale


class Downsample2D(nnx.Module):
    """A convolution that halves both sides.

    Args:
        channels: in and out.
        padding: of every side; 0 pads below and on the right only.
    """

    def __init__(self, channels: int, padding: int) -> None:
        self.conv = Conv(channels, channels, stride=2, padding=padding or ((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, h / 2, w / 2, channels)`."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Pixels repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        self.conv = Conv(channels, channels)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """Return `(B, *size, channels)`; without a size, both sides are doubled."""
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return self.conv(upsample(x, height, width))
