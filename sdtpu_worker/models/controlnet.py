"""A ControlNet: a copy of a UNet's way down that sees a picture, and what it adds to the UNet's way across."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
from flax import nnx

from sdtpu_worker.models.convolution import measure
from sdtpu_worker.models.layers import Conv
from sdtpu_worker.models.prompt_windows import Context, cast_context
from sdtpu_worker.models.unet import WayDown


class Residuals(NamedTuple):
    """What a ControlNet adds.

    Attributes:
        down: to each image that goes from the UNet's way down to its way up.
        mid: to the middle.
    """

    down: list[jax.Array]
    mid: jax.Array


class ConditioningEmbedding(nnx.Module):
    """Brings a picture to the size and the channels of what a UNet's first convolution gives."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], out_channels: int) -> None:
        self.conv_in = Conv(in_channels, channels[0])
        blocks = []
        for before, after in itertools.pairwise(channels):
            blocks += [Conv(before, before), Conv(before, after, stride=2)]
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(channels[-1], out_channels)

    def __call__(self, picture: jax.Array) -> jax.Array:
        """Map `(B, height, width, 3)` to `(B, h, w, C)`."""
        x = jax.nn.silu(self.conv_in(picture))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(WayDown):
    """diffusers' `ControlNetModel`.

    Args:
        config: of `configs.read_controlnet_config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ConditioningEmbedding(
            config.conditioning_channels, tuple(config.conditioning_embedding_out_channels), channels[0]
        )
        widths = [channels[0]]
        for block in self.down_blocks:
            out = block.resnets[0].conv1.weight.shape[-1]
            widths += [out] * (len(block.resnets) + len(block.downsamplers))
        self.controlnet_down_blocks = nnx.List([Conv(width, width, kernel=1, padding=0) for width in widths])
        self.controlnet_mid_block = Conv(channels[-1], channels[-1], kernel=1, padding=0)

    def embed(self, picture: jax.Array) -> jax.Array:
        """Return what a picture adds to the first convolution: the same for every step.

        Args:
            picture: `(B, height, width, 3)`, colours from 0 to 1.

        Returns:
            `(B, h, w, C)` in the dtype of the parameters.
        """
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture[..., ::-1]
        return self.controlnet_cond_embedding(picture.astype(self.conv_in.weight.dtype))

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: Context,
        embedded: jax.Array,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
    ) -> Residuals:
        """Return what to add to a UNet with the same inputs; they are those of `UNet.__call__`.

        Args:
            sample: latents `(B, h, w, in_channels)`.
            timesteps: `(B,) float32`.
            context: encoded prompts `(B, L, cross_attention_dim)`, perhaps with further windows.
            embedded: of `embed`, `(B, h, w, C)`.
            text_embeds: pooled prompts `(B, P)`, for the addition embedding "text_time".
            time_ids: sizes, crop and target `(B, N)`, for the same.
        """
        dtype = self.conv_in.weight.dtype
        time = self._embed_time(timesteps, text_embeds, time_ids, None).astype(dtype)
        context = cast_context(context, dtype)
        x = self.conv_in(sample.astype(dtype)) + embedded.astype(dtype)
        y, skips = self._go_down(measure(x), time, context)
        if self.mid_block is not None:
            y = self.mid_block(y, time, context)
        down = [conv(skip.image) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        mid = self.controlnet_mid_block(y.image)
        if self.config.global_pool_conditions:
            down, mid = [skip.mean((1, 2), keepdims=True) for skip in down], mid.mean((1, 2), keepdims=True)
        return Residuals(down, mid)
