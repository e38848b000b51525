"""The blocks of a UNet: one resolution each on the way down and up, and the middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx

from sdtpu_worker.models.convolution import Measured, measure
from sdtpu_worker.models.prompt_windows import Context
from sdtpu_worker.models.resnet import Downsample, ResnetBlock, Upsample
from sdtpu_worker.models.transformer import SpatialTransformer


@dataclass(frozen=True)
class BlockConfig:
    """What the layers of one block have in common.

    Attributes:
        channels: of the output.
        time_features: of the time embedding.
        groups: of all norms.
        norm_eps: of the residual blocks' norms.
        act_fn: of the residual blocks.
        scale_shift: see `ResnetBlock`.
        transformer_layers: blocks of each transformer, one number per residual block; empty without transformers.
        context_features: of the prompt's encoding.
        heads: of each attention.
        linear_projection: see `SpatialTransformer`.
        only_cross_attention: see `TransformerBlock`.
    """

    channels: int
    time_features: int
    groups: int
    norm_eps: float
    act_fn: str
    scale_shift: bool
    transformer_layers: tuple[int, ...]
    context_features: int
    heads: int
    linear_projection: bool
    only_cross_attention: bool

    def resnet(self, in_channels: int, output_scale: float = 1.0) -> ResnetBlock:
        """Return a residual block of this block."""
        return ResnetBlock(
            in_channels,
            self.channels,
            self.groups,
            self.norm_eps,
            self.act_fn,
            self.time_features,
            self.scale_shift,
            output_scale,
        )

    def transformers(self) -> nnx.List:
        """Return the transformers of this block."""
        return nnx.List(
            [
                SpatialTransformer(
                    self.channels,
                    self.context_features,
                    self.heads,
                    num_blocks,
                    self.groups,
                    self.linear_projection,
                    self.only_cross_attention,
                )
                for num_blocks in self.transformer_layers
            ]
        )


class DownBlock(nnx.Module):
    """Residual blocks, each with a transformer after it if the config has them, then half the resolution.

    Args:
        config: of the block.
        in_channels: of the input.
        num_layers: residual blocks.
        downsample_padding: see `Downsample`; None keeps the resolution.
    """

    def __init__(self, config: BlockConfig, in_channels: int, num_layers: int, downsample_padding: int | None) -> None:
        self.resnets = nnx.List([config.resnet(config.channels if i else in_channels) for i in range(num_layers)])
        self.attentions = config.transformers()
        halves = downsample_padding is not None
        self.downsamplers = nnx.List([Downsample(config.channels, downsample_padding or 0)] if halves else [])

    def __call__(self, x: Measured, time: jax.Array, context: Context) -> tuple[Measured, list[Measured]]:
        """Return the output and, for the way up, what each layer gave."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet.measured(x, time)
            if len(self.attentions):
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = measure(downsample(x.image))
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """The middle: a residual block, and a transformer with another residual block if the config has it.

    Args:
        config: of the block.
        output_scale: the residual blocks' sums are divided by it.
    """

    def __init__(self, config: BlockConfig, output_scale: float) -> None:
        count = 1 + len(config.transformer_layers)
        self.resnets = nnx.List([config.resnet(config.channels, output_scale) for _ in range(count)])
        self.attentions = config.transformers()

    def __call__(self, x: Measured, time: jax.Array, context: Context) -> Measured:
        """Map `(B, h, w, C)` to the same shape."""
        x = self.resnets[0].measured(x, time)
        for i, transformer in enumerate(self.attentions):
            x = self.resnets[i + 1].measured(transformer(x, context), time)
        return x


class UpBlock(nnx.Module):
    """As `DownBlock`, but each residual block also takes one image from the way down, and the resolution doubles.

    Args:
        config: of the block.
        in_channels: of the input.
        skip_channels: of the images from the way down, in the order in which they are used.
        upsamples: whether the resolution grows at the end.
    """

    def __init__(self, config: BlockConfig, in_channels: int, skip_channels: Sequence[int], upsamples: bool) -> None:
        self.resnets = nnx.List(
            [config.resnet((config.channels if i else in_channels) + skip) for i, skip in enumerate(skip_channels)]
        )
        self.attentions = config.transformers()
        self.upsamplers = nnx.List([Upsample(config.channels)] if upsamples else [])

    def __call__(self, x: Measured, skips: list[Measured], time: jax.Array, context: Context) -> Measured:
        """Return the output; takes its images off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet.measured(x.beside(skips.pop()), time)
            if len(self.attentions):
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            # The image that it meets next: for odd sizes it is not twice as large.
            x = upsample.measured(x.image, *skips[-1].image.shape[1:3])
        return x
