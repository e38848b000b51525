"""Residual blocks and the changes of resolution between them, for UNets and autoencoders."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.convolution import Measured, convolve_by_kernel, kernel_block, measure, turn
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
        return self.measured(Measured(x), time).image

    def measured(self, x: Measured, time: jax.Array | None = None) -> Measured:
        """Do the same with an image that may know its sums, and return such a one."""
        return self._by_kernels(x, time) if self._has_kernels(x.image) else measure(self._by_layers(x, time))

    def _has_kernels(self, x: jax.Array) -> bool:
        """Return whether there is a kernel for both convolutions."""
        between = jax.ShapeDtypeStruct((*x.shape[:-1], self.conv1.weight.shape[-1]), x.dtype)
        return self.output_scale == 1 and None not in (kernel_block(self.conv1, x), kernel_block(self.conv2, between))

    def _by_layers(self, x: Measured, time: jax.Array | None) -> jax.Array:
        y = self.conv1(self.activation(x.normalised(self.norm1)))
        if self.time_emb_proj is None:
            y = measure(y).normalised(self.norm2)
        else:
            shift = self.time_emb_proj(self.activation(time))[:, None, None]  # (B, 1, 1, C), or twice as many
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                y = measure(y).normalised(self.norm2) * (1 + scale) + shift
            else:
                y = measure(y + shift).normalised(self.norm2)
        y = self.conv2(self.activation(y))
        shortcut = x.image if self.conv_shortcut is None else self.conv_shortcut(x.image)
        return (shortcut + y) / self.output_scale

    def _by_kernels(self, x: Measured, time: jax.Array | None) -> Measured:
        """Do it by two kernels, with norms and activations in front of the convolutions and the rest behind them."""
        shift: jax.Array | None = None
        scale: jax.Array | None = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(self.activation(time)).astype(jnp.float32)
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
        before_norm = None if self.scale_shift else shift
        y = convolve_by_kernel(self.conv1, x.image, x.affine(self.norm1), self.activation, more_bias=before_norm)
        affine = y.affine(self.norm2)
        if scale is not None and shift is not None:
            affine = affine[0] * (1 + scale), affine[1] * (1 + scale) + shift
        shortcut, bias = self._shortcut(x.image)
        return convolve_by_kernel(self.conv2, y.image, affine, self.activation, shortcut, more_bias=bias)

    def _shortcut(self, x: jax.Array) -> tuple[Any, jax.Array | None]:
        """Return the shortcut as the kernel takes it, and its bias."""
        layer = self.conv_shortcut
        if layer is None or layer.adapter is not None:
            return x if layer is None else layer(x), None
        return (x, layer.weight[...][0, 0]), None if layer.bias is None else layer.bias[...]


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
        return self.measured(x, height, width).image

    def measured(self, x: jax.Array, height: int, width: int) -> Measured:
        """Do the same, and return perhaps the sums too."""
        doubles = (height, width) == (2 * x.shape[1], 2 * x.shape[2])
        if doubles and kernel_block(self.conv, x, doubles=True) is not None:
            return turn(convolve_by_kernel(self.conv, x, doubles=True))
        return measure(self.conv(resize_nearest(x, height, width)))
