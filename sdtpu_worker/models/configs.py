"""Read models' configs: refuse whatever the models here would not follow, and fill in PyTorch's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import config_tables
from sdtpu_worker.models.config_classes import (
    AutoencoderConfig,
    AutoencoderTinyConfig,
    ClipTextConfig,
    ClipVisionConfig,
    ControlNetConfig,
    UNetConfig,
)
from sdtpu_worker.models.config_rules import check

_ATTENDING = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}


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


def read_clip_text_config(raw: Mapping[str, Any], what: str = "the text encoder's config") -> ClipTextConfig:
    """Read the config of a `CLIPTextModel`, with or without projection.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        A config with transformers' defaults for what is missing.

    Raises:
        InvalidCheckpoint: a key or a value is not supported, or two of them do not fit.
    """
    return _clip(ClipTextConfig, check(raw, config_tables.CLIP_TEXT, what), what)


def read_safety_checker_config(raw: Mapping[str, Any], what: str = "the safety checker's config") -> Any:
    """Read the config of a `StableDiffusionSafetyChecker`.

    Args:
        raw: of its `config.json`.
        what: which config, for the error.

    Returns:
        An object with `vision_config`, a `ClipVisionConfig`, and `projection_dim`.

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
    config = _clip(ClipVisionConfig, check(vision, config_tables.CLIP_VISION, what), what)
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
    arguments = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in known.items() if key in arguments})


def _clip(kind: Any, known: Mapping[str, Any], what: str) -> Any:
    """Return the config of that class, if its heads fit."""
    config = _followed(kind, known)
    if config.hidden_size % config.num_attention_heads:
        raise InvalidCheckpoint(
            f"{what}: num_attention_heads must divide hidden_size {config.hidden_size}, got"
            f" {config.num_attention_heads}"
        )
    return config


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
