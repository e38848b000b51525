"""The UNet of Stable Diffusion 1.x, 2.x and XL: predicts the noise in latents, given a time and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.convolution import Measured, measure
from sdtpu_worker.models.layers import ACTIVATIONS, Conv, GroupNorm, TimestepEmbedding, sinusoids
from sdtpu_worker.models.prompt_windows import Context, cast_context
from sdtpu_worker.models.unet_blocks import BlockConfig, DownBlock, MidBlock, UpBlock


class WayDown(nnx.Module):
    """What a UNet and a ControlNet have in common: the time, the way down, the middle.

    Args:
        config: of `configs.read_unet_config` or `read_controlnet_config`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        channels = config.block_out_channels
        self.time_features = config.time_embedding_dim or 4 * channels[0]
        self.conv_in = Conv(
            config.in_channels, channels[0], config.conv_in_kernel, padding=(config.conv_in_kernel - 1) // 2
        )
        post_act = config.timestep_post_act
        self.time_embedding = TimestepEmbedding(
            channels[0],
            self.time_features,
            ACTIVATIONS[config.act_fn],
            None if post_act is None else ACTIVATIONS[post_act],
            config.time_cond_proj_dim,
        )
        self.add_embedding = self._make_add_embedding()
        self.down_blocks = nnx.List(self._make_down_blocks())
        self.mid_block = self._make_mid_block()

    def _block_config(self, level: int, transformer_layers: tuple[int, ...], **changes: Any) -> BlockConfig:
        config = self.config
        fields = {
            "channels": config.block_out_channels[level],
            "time_features": self.time_features,
            "groups": config.norm_num_groups,
            "norm_eps": config.norm_eps,
            "act_fn": config.act_fn,
            "scale_shift": config.resnet_time_scale_shift == "scale_shift",
            "transformer_layers": transformer_layers,
            "context_features": per_block(config.cross_attention_dim, config)[level],
            "heads": per_block(config.attention_head_dim, config)[level],
            "linear_projection": config.use_linear_projection,
            "only_cross_attention": per_block(config.only_cross_attention, config)[level],
        }
        return BlockConfig(**{**fields, **changes})

    def _make_add_embedding(self) -> TimestepEmbedding | None:
        if self.config.addition_embed_type is None:
            return None
        in_features = self.config.projection_class_embeddings_input_dim
        return TimestepEmbedding(in_features, self.time_features, jax.nn.silu)

    def _make_down_blocks(self) -> list[DownBlock]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        blocks, in_channels = [], config.block_out_channels[0]
        for i, kind in enumerate(config.down_block_types):
            num_layers = per_block(config.layers_per_block, config)[i]
            depth = per_block(config.transformer_layers_per_block, config)[i]
            depths = per_layer(depth, num_layers) if kind == "CrossAttnDownBlock2D" else ()
            block = self._block_config(i, depths)
            padding = None if i == last else config.downsample_padding
            blocks.append(DownBlock(block, in_channels, num_layers, padding))
            in_channels = block.channels
        return blocks

    def _make_mid_block(self) -> MidBlock | None:
        config = self.config
        if config.mid_block_type is None:
            return None
        depths: tuple[int, ...] = ()
        if config.mid_block_type == "UNetMidBlock2DCrossAttn":
            depths = per_layer(per_block(config.transformer_layers_per_block, config)[-1], 1)
        block = self._block_config(-1, depths, only_cross_attention=False)
        return MidBlock(block, config.mid_block_scale_factor)

    def _embed_time(
        self,
        timesteps: jax.Array,
        text_embeds: jax.Array | None,
        time_ids: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        """Return the embedding that every residual block takes, `(B, time_features) float32`.

        In float32: all blocks add the same rounding error, it is one row per image, and two timesteps a few apart must
        stay two.
        """
        config = self.config
        flags = config.flip_sin_to_cos, config.freq_shift
        time = self.time_embedding(sinusoids(timesteps, config.block_out_channels[0], *flags), timestep_cond)
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None:
                raise ValueError("this UNet needs text_embeds and time_ids (its addition_embed_type is text_time)")
            sizes = sinusoids(time_ids.reshape(-1), config.addition_time_embed_dim, *flags)
            sizes = sizes.reshape(len(time_ids), -1)
            time = time + self.add_embedding(jnp.concatenate([text_embeds.astype(jnp.float32), sizes], axis=-1))
        act = config.time_embedding_act_fn
        return time if act is None else ACTIVATIONS[act](time)

    def _go_down(self, x: Measured, time: jax.Array, context: Context) -> tuple[Measured, list[Measured]]:
        """Return what reaches the middle, and what goes across to the way up, `x` first."""
        skips = [x]
        for down_block in self.down_blocks:
            x, more = down_block(x, time, context)
            skips += more
        return x, skips


class UNet(WayDown):
    """diffusers' `UNet2DConditionModel`.

    Args:
        config: of `configs.read_unet_config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        channels = config.block_out_channels
        self.up_blocks = nnx.List(self._make_up_blocks())
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv(
            channels[0], config.out_channels, config.conv_out_kernel, padding=(config.conv_out_kernel - 1) // 2
        )

    def _make_up_blocks(self) -> list[UpBlock]:
        config = self.config
        channels = config.block_out_channels
        blocks, in_channels = [], channels[-1]
        for i, kind in enumerate(config.up_block_types):
            level = len(channels) - 1 - i
            num_layers = per_block(config.layers_per_block, config)[level] + 1
            depth = config.reverse_transformer_layers_per_block
            depth = per_block(config.transformer_layers_per_block, config)[level] if depth is None else depth[i]
            depths = per_layer(depth, num_layers) if kind == "CrossAttnUpBlock2D" else ()
            block = self._block_config(level, depths)
            skips = [block.channels] * (num_layers - 1) + [channels[max(level - 1, 0)]]
            blocks.append(UpBlock(block, in_channels, skips, upsamples=level > 0))
            in_channels = block.channels
        return blocks

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        context: Context,
        text_embeds: jax.Array | None = None,
        time_ids: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        down_residuals: Sequence[jax.Array] | None = None,
        mid_residual: jax.Array | None = None,
    ) -> jax.Array:
        """Predict.

        Args:
            sample: latents `(B, h, w, in_channels)`, any float; computed in the dtype of the parameters.
            timesteps: `(B,) float32`.
            context: encoded prompts `(B, L, cross_attention_dim)`, perhaps with further windows.
            text_embeds: pooled prompts `(B, P)`, for the addition embedding "text_time".
            time_ids: sizes, crop and target `(B, N)`, for the same; XL has six, its refiner five.
            timestep_cond: embedded guidance scale `(B, time_cond_proj_dim)`, for a UNet distilled with it.
            down_residuals: a ControlNet's addition to each image that goes from the way down to the way up.
            mid_residual: its addition to the middle.

        Returns:
            `(B, h, w, out_channels)` in the dtype of the parameters.

        Raises:
            ValueError: the addition embedding has no `text_embeds` or `time_ids`.
        """
        dtype = self.conv_in.weight.dtype
        time = self._embed_time(timesteps, text_embeds, time_ids, timestep_cond).astype(dtype)
        context = cast_context(context, dtype)
        sample = sample.astype(dtype)
        x = measure(self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample))
        x, skips = self._go_down(x, time, context)
        if down_residuals is not None:
            both = zip(skips, down_residuals, strict=True)
            skips = [measure(skip.image + extra.astype(dtype)) for skip, extra in both]
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        if mid_residual is not None:
            x = measure(x.image + mid_residual.astype(dtype))
        for up_block in self.up_blocks:
            x = up_block(x, skips, time, context)
        return self.conv_out(ACTIVATIONS[self.config.act_fn](x.normalised(self.conv_norm_out)))


def per_block(value: Any, config: Any) -> tuple[Any, ...]:
    """Return a config's value for each block, from one for all or one for each."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * len(config.block_out_channels)


def per_layer(value: Any, num_layers: int) -> tuple[int, ...]:
    """Return a block's value for each layer, from one for all or one for each; more than there are layers are cut."""
    return tuple(value)[:num_layers] if isinstance(value, list | tuple) else (value,) * num_layers
