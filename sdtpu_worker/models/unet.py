"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, and of what is distilled from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear, sinusoids
from sdtpu_worker.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from sdtpu_worker.models.transformer import Transformer2DModel


class UNet2DConditionModel(nnx.Module):
    """The UNet.

    Args:
        config: a `UNetConfig`.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        widths = config.block_out_channels
        time_width = 4 * widths[0]
        self.conv_in = Conv(config.in_channels, widths[0])
        self.time_embedding = TimestepEmbedding(
            widths[0], time_width, config.act_fn, config.timestep_post_act, config.time_cond_proj_dim
        )
        told_width = config.projection_class_embeddings_input_dim if config.addition_embed_type else 0
        self.add_embedding = TimestepEmbedding(told_width, time_width, config.act_fn) if told_width else None
        last = len(widths) - 1
        self.down_blocks = nnx.List(
            [DownBlock(config, i, widths[max(i - 1, 0)], width, is_last=i == last) for i, width in enumerate(widths)]
        )
        self.mid_block = None if config.mid_block_type is None else MidBlock(config)
        self.up_blocks = nnx.List([UpBlock(config, i) for i in range(len(widths))])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv(widths[0], config.out_channels)

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """Return the output, `(B, h, w, out_channels)` in the sample's dtype.

        Args:
            sample: `(B, h, w, in_channels)`.
            timesteps: `(B,) float32`.
            context: `(B, L, cross_attention_dim)`, the encoded prompt.
            text_embeds: `(B, P)`, the pooled prompt, for `addition_embed_type` "text_time".
            time_ids: `(B, 6) float32`, sizes in pixels, likewise.
            timestep_cond: `(B, time_cond_proj_dim)`, the embedded guidance scale, if the config has such a width.
        """
        config = self._config
        time = self._embed_time(timesteps, sample.dtype, text_embeds, time_ids, timestep_cond)
        x = self.conv_in(2 * sample - 1 if config.center_input_sample else sample)
        skips = [x]
        for down in self.down_blocks:
            x, more = down(x, time, context)
            skips += more
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for up in self.up_blocks:
            count = len(up.resnets)
            skips, own = skips[:-count], skips[-count:]
            x = up(x, own, time, context, skips[-1].shape[1:3] if skips else None)
        return self.conv_out(ACTIVATIONS[config.act_fn](self.conv_norm_out(x)))

    def _embed_time(
        self,
        timesteps: jax.Array,
        dtype: Any,
        text_embeds: jax.Array | None,
        time_ids: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        config = self._config
        flip, shift = config.flip_sin_to_cos, config.freq_shift
        position = sinusoids(timesteps, config.block_out_channels[0], flip, shift).astype(dtype)
        time = self.time_embedding(position, timestep_cond)
        if self.add_embedding is not None and text_embeds is not None and time_ids is not None:
            sizes = sinusoids(time_ids, config.addition_time_embed_dim, flip, shift).reshape(time_ids.shape[0], -1)
            time = time + self.add_embedding(jnp.concatenate([text_embeds.astype(dtype), sizes.astype(dtype)], axis=-1))
        if config.time_embedding_act_fn is not None:
            time = ACTIVATIONS[config.time_embedding_act_fn](time)
        return time


class TimestepEmbedding(nnx.Module):
    """Two linear layers with an activation between them.

    Args:
        inputs, outputs: widths.
        activation, post_activation: their names; the second follows the second layer, if there is one.
        condition: width of what is added to the input, without a bias; None for nothing.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str,
        post_activation: str | None = None,
        condition: int | None = None,
    ) -> None:
        self.linear_1, self.linear_2 = Linear(inputs, outputs), Linear(outputs, outputs)
        self.cond_proj = None if condition is None else Linear(condition, inputs, bias=False)
        self._activate, self._post_activation = ACTIVATIONS[activation], post_activation

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Return `(B, outputs)` of `(B, inputs)`."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition.astype(x.dtype))
        x = self.linear_2(self._activate(self.linear_1(x)))
        return x if self._post_activation is None else ACTIVATIONS[self._post_activation](x)


def _resnet(config: Any, inputs: int, outputs: int, output_scale: float = 1.0) -> ResnetBlock2D:
    return ResnetBlock2D(
        inputs,
        outputs,
        config.norm_num_groups,
        config.norm_eps,
        config.act_fn,
        4 * config.block_out_channels[0],
        config.resnet_time_scale_shift == "scale_shift",
        output_scale,
    )


def _attentions(config: Any, block: int, channels: int, layers: Sequence[int], only_cross: bool = False) -> nnx.List:
    """Return a transformer for each of a block's residual blocks."""
    return nnx.List(
        [
            Transformer2DModel(
                channels,
                config.heads[block],
                count,
                config.context_widths[block],
                config.norm_num_groups,
                config.use_linear_projection,
                only_cross,
            )
            for count in layers
        ]
    )


class DownBlock(nnx.Module):
    """Residual blocks with transformers, then a way down (DownBlock2D, CrossAttnDownBlock2D)."""

    def __init__(self, config: Any, number: int, inputs: int, outputs: int, is_last: bool) -> None:
        count = config.layers[number]
        self.resnets = nnx.List([_resnet(config, outputs if i else inputs, outputs) for i in range(count)])
        attends, layers = config.down_block_types[number].startswith("CrossAttn"), config.transformer_layers[number]
        self.attentions = _attentions(config, number, outputs, layers, config.only_cross[number]) if attends else None
        self.downsamplers = None if is_last else nnx.List([Downsample2D(outputs, config.downsample_padding)])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Return the output, and all outputs on the way to it, for the block on the way up."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """A transformer between two residual blocks (UNetMidBlock2DCrossAttn)."""

    def __init__(self, config: Any) -> None:
        width, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        self.resnets = nnx.List([_resnet(config, width, width, scale) for _ in range(2)])
        self.attentions = _attentions(config, -1, width, config.transformer_layers[-1][-1:])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        """Return an array like `x`, `(B, h, w, C)`."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpBlock(nnx.Module):
    """Residual blocks with transformers over the skips, then a way up (UpBlock2D, CrossAttnUpBlock2D)."""

    def __init__(self, config: Any, number: int) -> None:
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        before, outputs, below = widths[max(number - 1, 0)], widths[number], widths[min(number + 1, last)]
        count = config.layers[last - number] + 1
        self.resnets = nnx.List(
            [
                _resnet(config, (outputs if i else before) + (outputs if i < count - 1 else below), outputs)
                for i in range(count)
            ]
        )
        attends, layers = config.up_block_types[number].startswith("CrossAttn"), config.transformer_layers_up[number]
        only_cross = config.only_cross[last - number]
        self.attentions = _attentions(config, last - number, outputs, layers, only_cross) if attends else None
        self.upsamplers = None if number == last else nnx.List([Upsample2D(outputs)])

    def __call__(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array],
        time: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        """Return `(B, *size, outputs)`.

        Args:
            x: from below.
            skips: of the way down, one for each residual block; the last one comes first.
            time: the time embedding.
            context: the prompt.
            size: what the next block's skips have; None for the last block.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[-1 - i]], axis=-1), time)
            if self.attentions is not None:
                x = self.attentions[i](x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)
