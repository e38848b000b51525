"""The tiny autoencoder (TAESD), distilled from a large one: convolutions and nothing else, in two halves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.autoencoder import Moments
from sdtpu_worker.models.layers import ACTIVATIONS, Conv, Nothing, resize_nearest

_LATENT_LIMIT = 3.0  # the decoder was trained on latents that a tanh keeps within it
_NO_VARIANCE = -30.0  # the smallest logarithm that the large autoencoder gives


class Activation(nnx.Module):
    """An activation that stands among layers and counts as one."""

    def __init__(self, act_fn: str) -> None:
        self.activation = ACTIVATIONS[act_fn]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the activation of each value."""
        return self.activation(x)


class Double(nnx.Module):
    """Twice the height and width, by repeating pixels."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to `(B, 2 h, 2 w, C)`."""
        return resize_nearest(x, 2 * x.shape[1], 2 * x.shape[2])


class TinyBlock(nnx.Module):
    """Three convolutions beside a shortcut, then a ReLU."""

    def __init__(self, channels: int, act_fn: str) -> None:
        convs = [Conv(channels, channels) for _ in range(3)]
        self.conv = nnx.List([convs[0], Nothing(), convs[1], Nothing(), convs[2]])  # activations stand at 1 and 3
        self.activation = ACTIVATIONS[act_fn]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to the same shape."""
        y = self.activation(self.conv[0](x))
        y = self.activation(self.conv[2](y))
        return jax.nn.relu(self.conv[4](y) + x)


class TinyEncoder(nnx.Module):
    """Pixels to latents."""

    def __init__(self, config: Any) -> None:
        layers: list[nnx.Module] = []
        for i, (channels, count) in enumerate(
            zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)
        ):
            first = Conv(config.in_channels, channels) if i == 0 else Conv(channels, channels, stride=2, bias=False)
            layers += [first, *(TinyBlock(channels, config.act_fn) for _ in range(count))]
        self.layers = nnx.List([*layers, Conv(config.encoder_block_out_channels[-1], config.latent_channels)])

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map `(B, H, W, 3)` in -1 … 1 to `(B, h, w, C)`."""
        x = (image + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class TinyDecoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: Any) -> None:
        widths, counts = config.decoder_block_out_channels, config.num_decoder_blocks
        layers: list[nnx.Module] = [Conv(config.latent_channels, widths[0]), Activation(config.act_fn)]
        for i, (channels, count) in enumerate(zip(widths, counts, strict=True)):
            is_last = i == len(widths) - 1
            layers += [TinyBlock(channels, config.act_fn) for _ in range(count)]
            layers += [] if is_last else [Double()]
            layers += [Conv(channels, config.out_channels if is_last else channels, bias=is_last)]
        self.layers = nnx.List(layers)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to `(B, H, W, 3)`, about -1 … 1."""
        x = jnp.tanh(latents / _LATENT_LIMIT) * _LATENT_LIMIT
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1


class AutoencoderTinyEncoder(nnx.Module):
    """The half of diffusers' `AutoencoderTiny` that makes latents of pixels.

    Args:
        config: of `configs.read_autoencoder_config`.
    """

    def __init__(self, config: Any) -> None:
        self.encoder = TinyEncoder(config)

    def __call__(self, image: jax.Array) -> Moments:
        """Encode an image `(B, H, W, 3)` in -1 … 1; there is no variance, as far as numbers go."""
        latents = self.encoder(image.astype(self.encoder.layers[0].weight.dtype))
        return Moments(latents, jnp.full_like(latents, _NO_VARIANCE))


class AutoencoderTinyDecoder(nnx.Module):
    """The half of diffusers' `AutoencoderTiny` that makes pixels of latents.

    Args:
        config: of `configs.read_autoencoder_config`.
    """

    def __init__(self, config: Any) -> None:
        self.decoder = TinyDecoder(config)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Decode `(B, h, w, C)`, already divided by the scaling factor, to `(B, H, W, 3)`, about -1 … 1."""
        return self.decoder(latents.astype(self.decoder.layers[0].weight.dtype))
