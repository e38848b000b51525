"""The autoencoder between pixels and latents (AutoencoderKL), each half a network of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention import Attention
from sdtpu_worker.models.layers import ACTIVATIONS, Conv, GroupNorm
from sdtpu_worker.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

_EPS = 1e-6


class AutoencoderDecoder(nnx.Module):
    """From latents to pixels.

    Args:
        config: an `AutoencoderConfig`.
    """

    def __init__(self, config: Any) -> None:
        channels = config.latent_channels
        self.post_quant_conv = Conv(channels, channels, 1) if config.use_post_quant_conv else None
        self.decoder = Decoder(config)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Return an image, `(B, h * f, w * f, 3)` from about -1 to 1, of latents `(B, h, w, C)`."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class AutoencoderEncoder(nnx.Module):
    """From pixels to latents.

    Args:
        config: an `AutoencoderConfig`.
    """

    def __init__(self, config: Any) -> None:
        channels = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Conv(channels, channels, 1) if config.use_quant_conv else None

    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and logarithm of the variance of the latents, each `(B, H / f, W / f, C)`.

        Args:
            image: `(B, H, W, 3)`, from -1 to 1.
        """
        moments = self.encoder(image)
        mean, log_variance = jnp.split(moments if self.quant_conv is None else self.quant_conv(moments), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)


class Encoder(nnx.Module):
    """The blocks from pixels to moments."""

    def __init__(self, config: Any) -> None:
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0])
        self.down_blocks = nnx.List(
            [
                DownBlock(config, widths[max(i - 1, 0)], width, is_last=i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(config, widths[-1])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels)
        self._activate = ACTIVATIONS[config.act_fn]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, h, w, 2 C)` of `(B, H, W, 3)`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self._activate(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """The blocks from latents to pixels."""

    def __init__(self, config: Any) -> None:
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nnx.List(
            [
                UpBlock(config, widths[max(i - 1, 0)], width, is_last=i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = Conv(widths[-1], config.out_channels)
        self._activate = ACTIVATIONS[config.act_fn]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, H, W, 3)` of `(B, h, w, C)`."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self._activate(self.conv_norm_out(x)))


class DownBlock(nnx.Module):
    """Residual blocks, then a way down (DownEncoderBlock2D)."""

    def __init__(self, config: Any, inputs: int, outputs: int, is_last: bool) -> None:
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block)
        self.downsamplers = None if is_last else nnx.List([Downsample2D(outputs, 0)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, h / 2, w / 2, outputs)`; the last block keeps the sides."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nnx.Module):
    """Residual blocks, then a way up (UpDecoderBlock2D)."""

    def __init__(self, config: Any, inputs: int, outputs: int, is_last: bool) -> None:
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block + 1)
        self.upsamplers = None if is_last else nnx.List([Upsample2D(outputs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, 2 h, 2 w, outputs)`; the last block keeps the sides."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class MidBlock(nnx.Module):
    """Attention between two residual blocks (UNetMidBlock2D)."""

    def __init__(self, config: Any, channels: int) -> None:
        self.resnets = _resnets(config, channels, channels, 2)
        has_attention = config.mid_block_add_attention
        self.attentions = nnx.List([AttentionBlock(config, channels)]) if has_attention else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like `x`, `(B, h, w, channels)`."""
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class AttentionBlock(Attention):
    """Attention with one head over a norm, beside the input."""

    def __init__(self, config: Any, channels: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = GroupNorm(config.norm_num_groups, channels, _EPS)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Return an array like `x`, `(B, h, w, channels)`."""
        rows = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(rows).reshape(x.shape)


def _resnets(config: Any, inputs: int, outputs: int, count: int) -> nnx.List:
    return nnx.List(
        [
            ResnetBlock2D(outputs if i else inputs, outputs, config.norm_num_groups, _EPS, config.act_fn)
            for i in range(count)
        ]
    )
