"""Read models' configs: refuse whatever the models here would not follow, and fill in PyTorch's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from transformers import CLIPTextConfig, CLIPVisionConfig

from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import config_tables
from sdtpu_worker.models.config_rules import check

_ATTENDING = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}


class UNetConfig(ConfigMixin):
    """The keys of a UNet that are followed, with diffusers' defaults."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: Any = 1,
        reverse_transformer_layers_per_block: Any = None,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        resnet_time_scale_shift: str = "default",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
    ) -> None:
        pass


class ControlNetConfig(ConfigMixin):
    """The keys of a ControlNet that are followed, with diffusers' defaults, and what a UNet has besides."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: Any = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
    ) -> None:
        self.register_to_config(
            time_embedding_dim=None,
            time_embedding_act_fn=None,
            timestep_post_act=None,
            time_cond_proj_dim=None,
            conv_in_kernel=3,
        )


class AutoencoderConfig(ConfigMixin):
    """The keys of an autoencoder that are followed, with diffusers' defaults."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        pass


class AutoencoderTinyConfig(ConfigMixin):
    """The keys of a tiny autoencoder that are followed, with diffusers' defaults, and what a large one has besides."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        decoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        act_fn: str = "relu",
        latent_channels: int = 4,
        num_encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        num_decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float | None = 0.0,
    ) -> None:
        self.register_to_config(block_out_channels=decoder_block_out_channels, latents_mean=None, latents_std=None)


def read_unet_config(raw: Mapping[str, Any], what: str = "the UNet's config") -> Any:
    """Read the config of a `UNet2DConditionModel`.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        An object with an attribute for each argument of `UNetConfig`.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    config = _followed(UNetConfig, check(raw, config_tables.UNET, what))
    channels, groups = config.block_out_channels, config.norm_num_groups
    per_block = (
        *("down_block_types", "up_block_types", "only_cross_attention", "layers_per_block", "cross_attention_dim"),
        *("attention_head_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    )
    _check_lengths(config, per_block, what)
    _check_groups(channels, groups, what)
    _check_heads(config, what)
    _check_transformer_layers(config, what)
    _check_time_keys(config, what)
    return config


def read_controlnet_config(raw: Mapping[str, Any], what: str = "the ControlNet's config") -> Any:
    """Read the config of a `ControlNetModel`.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        An object with an attribute for each argument of `ControlNetConfig`, and for those of `UNetConfig` that concern
        the way down.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    config = _followed(ControlNetConfig, check(raw, config_tables.CONTROLNET, what))
    _check_lengths(config, ("down_block_types", "only_cross_attention", "attention_head_dim"), what)
    _check_lengths(config, ("transformer_layers_per_block",), what)
    _check_groups(config.block_out_channels, config.norm_num_groups, what)
    _check_time_keys(config, what)
    return config


def read_autoencoder_config(raw: Mapping[str, Any], what: str = "the VAE's config") -> Any:
    """Read the config of an `AutoencoderKL`, or of an `AutoencoderTiny` if its `_class_name` says so.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        An object with an attribute for each argument of `AutoencoderConfig`; a tiny one has no norms and layers.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    if raw.get("_class_name") == "AutoencoderTiny":
        return _read_tiny_config(raw, what)
    config = _followed(AutoencoderConfig, check(raw, config_tables.AUTOENCODER, what))
    channels = config.block_out_channels
    for key, wanted in (
        ("down_block_types", len(channels)),
        ("up_block_types", len(channels)),
        ("latents_mean", config.latent_channels),
        ("latents_std", config.latent_channels),
    ):
        value = getattr(config, key)
        if value is not None and len(value) != wanted:
            raise InvalidCheckpoint(f"{what}: {key} must have {wanted} values, got {value!r}")
    _check_groups(channels, config.norm_num_groups, what)
    return config


def read_clip_text_config(raw: Mapping[str, Any], what: str = "the text encoder's config") -> CLIPTextConfig:
    """Read the config of a `CLIPTextModel`, with or without projection.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        transformers' config, so that its defaults fill in what is missing.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    return _clip(CLIPTextConfig, check(raw, config_tables.CLIP_TEXT, what), what)


def read_safety_checker_config(raw: Mapping[str, Any], what: str = "the safety checker's config") -> Any:
    """Read the config of a `StableDiffusionSafetyChecker`.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        An object with `vision_config`, transformers' `CLIPVisionConfig`, and `projection_dim`.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    known = check(raw, config_tables.SAFETY_CHECKER, what)
    vision = dict(known.get("vision_config", {}))
    for key, value in (known.get("vision_config_dict") or {}).items():  # transformers 4 wrote some keys twice
        if vision.setdefault(key, value) != value:
            raise InvalidCheckpoint(
                f"{what}: vision_config_dict must say the same as vision_config, got {key} = {value!r} and"
                f" {vision[key]!r}"
            )
    what = f"{what}, vision_config"
    config = _clip(CLIPVisionConfig, check(vision, config_tables.CLIP_VISION, what), what)
    return SimpleNamespace(vision_config=config, projection_dim=known.get("projection_dim", 512))


def _read_tiny_config(raw: Mapping[str, Any], what: str) -> Any:
    config = _followed(AutoencoderTinyConfig, check(raw, config_tables.AUTOENCODER_TINY, what))
    for half in ("encoder", "decoder"):
        widths, counts = getattr(config, f"{half}_block_out_channels"), getattr(config, f"num_{half}_blocks")
        if len(set(widths)) != 1 or len(widths) != len(counts):
            raise InvalidCheckpoint(
                f"{what}: {half}_block_out_channels must be one number, as often as num_{half}_blocks has values"
                f" ({len(counts)}), got {widths!r}"
            )
    return config


def _followed(kind: Any, known: Mapping[str, Any]) -> Any:
    """Return the config of that class; a key that may have one value only is checked, and not an argument."""
    arguments = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in known.items() if key in arguments}).config


def _clip(kind: Any, known: Mapping[str, Any], what: str) -> Any:
    """Return transformers' config of that class."""
    ours = {"model_type", "add_cross_attention", "is_decoder", "pruned_heads"}  # checked; of no further use
    settings = {key: value for key, value in known.items() if key not in ours}
    defaults = kind()
    hidden_size = settings.get("hidden_size", defaults.hidden_size)
    heads = settings.get("num_attention_heads", defaults.num_attention_heads)
    if hidden_size % heads:  # before transformers 5 finds it, whose error names no key
        raise InvalidCheckpoint(f"{what}: num_attention_heads must divide hidden_size {hidden_size}, got {heads}")
    return kind(**settings)


def _check_groups(channels: Sequence[int], groups: int, what: str) -> None:
    for value in channels:
        if value % groups:
            raise InvalidCheckpoint(
                f"{what}: norm_num_groups must divide each of block_out_channels {list(channels)}, got {groups}"
            )


def _check_lengths(config: Any, keys: Sequence[str], what: str) -> None:
    count = len(config.block_out_channels)
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, list | tuple) and len(value) != count:
            raise InvalidCheckpoint(f"{what}: {key} must have {count} values, as block_out_channels has, got {value!r}")


def _check_time_keys(config: Any, what: str) -> None:
    if config.addition_embed_type == "text_time":
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if getattr(config, key) is None:
                raise InvalidCheckpoint(
                    f"{what}: {key} must be a whole number where addition_embed_type is 'text_time', got None"
                )


def _check_heads(config: Any, what: str) -> None:
    channels, heads = config.block_out_channels, config.attention_head_dim
    each = heads if isinstance(heads, list | tuple) else (heads,) * len(channels)
    kinds = [{down, up} for down, up in zip(config.down_block_types, reversed(config.up_block_types), strict=True)]
    kinds[-1].add(config.mid_block_type)
    for kind, value, number in zip(kinds, channels, each, strict=True):
        if kind & _ATTENDING and value % number:
            raise InvalidCheckpoint(
                f"{what}: attention_head_dim (the number of heads) must divide each of block_out_channels"
                f" {list(channels)}, got {heads!r}"
            )


def _check_transformer_layers(config: Any, what: str) -> None:
    depths, back = config.transformer_layers_per_block, config.reverse_transformer_layers_per_block
    if back is None and isinstance(depths, list | tuple) and any(isinstance(d, list | tuple) for d in depths):
        raise InvalidCheckpoint(
            f"{what}: reverse_transformer_layers_per_block must be given where transformer_layers_per_block has lists"
            f" in it, got {depths!r}"
        )
    layers = config.layers_per_block
    counts = list(layers) if isinstance(layers, list | tuple) else [layers] * len(config.block_out_channels)
    for key, value, wanted in (
        ("transformer_layers_per_block", depths, counts),
        ("reverse_transformer_layers_per_block", back, [count + 1 for count in reversed(counts)]),
    ):
        for depth, number in zip(value if isinstance(value, list | tuple) else (), wanted, strict=False):
            if isinstance(depth, list | tuple) and len(depth) < number:
                raise InvalidCheckpoint(f"{what}: a list in {key} must have {number} values, got {depth!r}")
