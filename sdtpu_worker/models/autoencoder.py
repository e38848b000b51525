"""The variational autoencoder between pixels and latents, in two halves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention import Attention
from sdtpu_worker.models.convolution import Measured, normalise_and_convolve
from sdtpu_worker.models.layers import Conv, GroupNorm
from sdtpu_worker.models.resnet import Downsample, ResnetBlock, Upsample

_EPS = 1e-6


class Moments(NamedTuple):
    """The normal distribution of an image's latents: `mean` and `logvar`, each `(B, h, w, C)`."""

    mean: jax.Array
    logvar: jax.Array


def _resnet(config: Any, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, config.norm_num_groups, _EPS, config.act_fn)


def _resnets(config: Any, in_channels: int, out_channels: int, count: int) -> nnx.List:
    return nnx.List([_resnet(config, out_channels if i else in_channels, out_channels) for i in range(count)])


class PixelAttention(Attention):
    """Attention of one head among all pixels, after a norm and beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, _EPS)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # attends to nothing but its input
        """Map `(B, h, w, C)` to the same shape."""
        batch, height, width, channels = x.shape
        y = self.group_norm(x).reshape(batch, height * width, channels)
        return x + super().__call__(y, y).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual blocks around an attention, which a config can leave out."""

    def __init__(self, config: Any, channels: int) -> None:
        attends = config.mid_block_add_attention
        self.attentions = nnx.List([PixelAttention(channels, config.norm_num_groups)] if attends else [])
        self.resnets = nnx.List([_resnet(config, channels, channels) for _ in range(2)])

    def __call__(self, x: Measured) -> Measured:
        """Map `(B, h, w, C)` to the same shape."""
        x = self.resnets[0].measured(x)
        for layer in self.attentions:
            x = Measured(layer(x.image))
        return self.resnets[1].measured(x)


class DownBlock(nnx.Module):
    """Residual blocks, then half the resolution, except in the last block."""

    def __init__(self, config: Any, in_channels: int, out_channels: int, is_last: bool) -> None:
        self.resnets = _resnets(config, in_channels, out_channels, config.layers_per_block)
        self.downsamplers = nnx.List([] if is_last else [Downsample(out_channels, padding=0)])

    def __call__(self, x: Measured) -> Measured:
        """Map `(B, h, w, in)` to `(B, h / 2, w / 2, out)`."""
        for layer in self.resnets:
            x = layer.measured(x)
        for downsample in self.downsamplers:
            x = Measured(downsample(x.image))
        return x


class UpBlock(nnx.Module):
    """Residual blocks, then twice the resolution, except in the last block."""

    def __init__(self, config: Any, in_channels: int, out_channels: int, is_last: bool) -> None:
        self.resnets = _resnets(config, in_channels, out_channels, config.layers_per_block + 1)
        self.upsamplers = nnx.List([] if is_last else [Upsample(out_channels)])

    def __call__(self, x: Measured) -> Measured:
        """Map `(B, h, w, in)` to `(B, 2 h, 2 w, out)`."""
        for layer in self.resnets:
            x = layer.measured(x)
        for upsample in self.upsamplers:
            x = upsample.measured(x.image, 2 * x.image.shape[1], 2 * x.image.shape[2])
        return x


class Encoder(nnx.Module):
    """Pixels to twice the channels of a latent."""

    def __init__(self, config: Any) -> None:
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0])
        inputs = [channels[0], *channels[:-1]]
        self.down_blocks = nnx.List(
            [
                DownBlock(config, before, after, is_last=i == len(channels) - 1)
                for i, (before, after) in enumerate(zip(inputs, channels, strict=True))
            ]
        )
        self.mid_block = MidBlock(config, channels[-1])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], _EPS)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels)
        self.activation = jax.nn.silu

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, H, W, 3)` to `(B, h, w, 2 C)`."""
        y = Measured(self.conv_in(x))
        for block in self.down_blocks:
            y = block(y)
        return normalise_and_convolve(self.conv_norm_out, self.activation, self.conv_out, self.mid_block(y))


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: Any) -> None:
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0])
        self.mid_block = MidBlock(config, channels[0])
        inputs = [channels[0], *channels[:-1]]
        self.up_blocks = nnx.List(
            [
                UpBlock(config, before, after, is_last=i == len(channels) - 1)
                for i, (before, after) in enumerate(zip(inputs, channels, strict=True))
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], _EPS)
        self.conv_out = Conv(channels[-1], config.out_channels)
        self.activation = jax.nn.silu

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to `(B, H, W, 3)`."""
        y = self.mid_block(Measured(self.conv_in(x)))
        for block in self.up_blocks:
            y = block(y)
        return normalise_and_convolve(self.conv_norm_out, self.activation, self.conv_out, y)


class AutoencoderEncoder(nnx.Module):
    """The half of diffusers' `AutoencoderKL` that makes latents of pixels.

    Args:
        config: of `configs.read_autoencoder_config`.
    """

    def __init__(self, config: Any) -> None:
        channels = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Conv(channels, channels, kernel=1, padding=0) if config.use_quant_conv else None

    def __call__(self, image: jax.Array) -> Moments:
        """Encode an image `(B, H, W, 3)` in -1 … 1; the result is in the dtype of the parameters and not scaled."""
        y = self.encoder(image.astype(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            y = self.quant_conv(y)
        mean, logvar = jnp.split(y, 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))


class AutoencoderDecoder(nnx.Module):
    """The half of diffusers' `AutoencoderKL` that makes pixels of latents.

    Args:
        config: of `configs.read_autoencoder_config`.
    """

    def __init__(self, config: Any) -> None:
        channels = config.latent_channels
        self.decoder = Decoder(config)
        self.post_quant_conv = Conv(channels, channels, kernel=1, padding=0) if config.use_post_quant_conv else None

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Decode `(B, h, w, C)`, already divided by the scaling factor, to `(B, H, W, 3)`, about -1 … 1."""
        x = latents.astype(self.decoder.conv_in.weight.dtype)
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))
