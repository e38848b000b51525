"""The configs of checkpoints, read key by key. A key or a value that is not listed here is an error.

A config says how a network computes. One that is passed over silently gives other pictures than the checkpoint's
author saw, so every key of the models' classes stands in a table: honoured, with the values that are; or without a
meaning here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layers import ACTIVATIONS
from sdtpu_worker.redaction import brief


@dataclass(frozen=True)
class Key:
    """What a key of a config may say.

    Attributes:
        default: its value where it is missing, as in PyTorch's class.
        allows: whether a value is honoured.
        allowed: that in words; the reason for a key that has no meaning here.
    """

    default: Any
    allows: Callable[[Any], bool]
    allowed: str


def _is_count(value: Any, low: int = 1) -> bool:
    return type(value) is int and low <= value <= 1_000_000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(check, value))


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


_counts = _is_list_of(_is_count)


def _count(default: int | None, optional: bool = False) -> Key:
    if optional:
        return Key(default, lambda value: value is None or _is_count(value), "an integer from 1, or null")
    return Key(default, _is_count, "an integer from 1")


def _number(default: float) -> Key:
    return Key(default, _is_number, "a number")


def _switch(default: bool) -> Key:
    return Key(default, lambda value: isinstance(value, bool), "true or false")


def _only(*values: Any) -> Key:
    """Return a key with these values, of which the first is the default."""
    return Key(values[0], lambda value: any(value == each and type(value) is type(each) for each in values),
               " or ".join(map(_json, values)))  # fmt: skip


def _activation(default: str | None) -> Key:
    names = [*ACTIVATIONS] if default else [None, *ACTIVATIONS]
    return Key(default, lambda value: value in names, " or ".join(map(_json, names)))


def _blocks(*names: str) -> Key:
    return Key(None, _is_list_of(lambda value: value in names), f"a list of {' or '.join(names)}")


def _without_meaning(reason: str) -> Key:
    return Key(None, lambda value: True, reason)


def _json(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, int) or isinstance(
        value, bool) else str(value)  # fmt: skip


_TRAINING = _without_meaning("about training")
_BOOKKEEPING = _without_meaning("says where the config comes from")
_COMMON = {
    "_class_name": _BOOKKEEPING,
    "_diffusers_version": _BOOKKEEPING,
    "_name_or_path": _BOOKKEEPING,
    "_use_default_values": _BOOKKEEPING,
    "_commit_hash": _BOOKKEEPING,
    "dtype": _without_meaning("the worker's sdtpu_dtype counts"),
    **dict.fromkeys(
        ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
         "max_value"), _TRAINING
    ),
}  # fmt: skip
_SIZE = Key(None, _either(_is_count, lambda v: _counts(v) and len(v) == 2), "an integer from 1, or two of them")

UNET_KEYS: dict[str, Key] = {
    **_COMMON,
    "sample_size": _SIZE,
    "in_channels": _count(4),
    "out_channels": _count(4),
    "center_input_sample": _switch(False),
    "flip_sin_to_cos": _switch(True),
    "freq_shift": _number(0),
    "down_block_types": _blocks("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": _only("UNetMidBlock2DCrossAttn", None),
    "up_block_types": _blocks("UpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": Key(
        False, _either(lambda v: isinstance(v, bool), _is_list_of(lambda v: isinstance(v, bool))), "true, false or a list"
    ),
    "block_out_channels": Key((320, 640, 1280, 1280), _counts, "a list of integers from 1"),
    "layers_per_block": Key(2, _either(_is_count, _counts), "an integer from 1, or a list of them"),
    "downsample_padding": Key(1, lambda v: v in (0, 1) and type(v) is int, "0 or 1"),
    "mid_block_scale_factor": _number(1),
    "dropout": _TRAINING,
    "act_fn": _activation("silu"),
    "norm_num_groups": _count(32),
    "norm_eps": _number(1e-5),
    "cross_attention_dim": Key(1280, _either(_is_count, _counts), "an integer from 1, or a list of them"),
    "transformer_layers_per_block": Key(
        1, _either(_is_count, _is_list_of(_either(lambda v: _is_count(v, 0), _counts))),
        "an integer from 1, or a list of them or of lists of them",
    ),
    "reverse_transformer_layers_per_block": Key(
        None, _either(lambda v: v is None, _is_list_of(_either(lambda v: _is_count(v, 0), _counts))),
        "null, or a list of integers or of lists of them",
    ),
    "encoder_hid_dim": _only(None),
    "encoder_hid_dim_type": _only(None),
    "attention_head_dim": Key(8, _either(_is_count, _counts), "an integer from 1, or a list of them"),
    "num_attention_heads": _only(None),
    "dual_cross_attention": _only(False),
    "use_linear_projection": _switch(False),
    "class_embed_type": _only(None),
    "addition_embed_type": _only(None, "text_time"),
    "addition_time_embed_dim": _count(None, optional=True),
    "num_class_embeds": _only(None),
    "upcast_attention": Key(False, lambda v: v is None or isinstance(v, bool), "true, false or null: it always is"),
    "resnet_time_scale_shift": _only("default", "scale_shift"),
    "resnet_skip_time_act": _only(False),
    "resnet_out_scale_factor": Key(1.0, lambda v: v == 1, "1"),
    "time_embedding_type": _only("positional"),
    "time_embedding_dim": _only(None),
    "time_embedding_act_fn": _activation(None),
    "timestep_post_act": _activation(None),
    "time_cond_proj_dim": _count(None, optional=True),
    "conv_in_kernel": Key(3, lambda v: v == 3, "3"),
    "conv_out_kernel": Key(3, lambda v: v == 3, "3"),
    "projection_class_embeddings_input_dim": _count(None, optional=True),
    "attention_type": _only("default"),
    "class_embeddings_concat": _only(False),
    "mid_block_only_cross_attention": Key(None, lambda v: v is None or v is False, "null or false"),
    "cross_attention_norm": _only(None),
    "addition_embed_type_num_heads": _without_meaning("of a kind of embedding that is refused"),
    "use_memory_efficient_attention": _without_meaning("how diffusers' Flax models computed the same"),
    "split_head_dim": _without_meaning("how diffusers' Flax models computed the same"),
    "pre_norm": _only(True),
}  # fmt: skip

AUTOENCODER_KEYS: dict[str, Key] = {
    **_COMMON,
    "in_channels": Key(3, lambda v: v == 3, "3"),
    "out_channels": Key(3, lambda v: v == 3, "3"),
    "down_block_types": _blocks("DownEncoderBlock2D"),
    "up_block_types": _blocks("UpDecoderBlock2D"),
    "block_out_channels": Key((64,), _counts, "a list of integers from 1"),
    "layers_per_block": _count(1),
    "act_fn": _activation("silu"),
    "latent_channels": _count(4),
    "norm_num_groups": _count(32),
    "sample_size": _without_meaning("the UNet's sample_size counts"),
    "scaling_factor": _number(0.18215),
    "shift_factor": _only(None),
    "latents_mean": Key(None, lambda v: v is None or _is_list_of(_is_number)(v), "null or a list of numbers"),
    "latents_std": Key(None, lambda v: v is None or _is_list_of(_is_number)(v), "null or a list of numbers"),
    "force_upcast": _switch(False),
    "use_quant_conv": _switch(True),
    "use_post_quant_conv": _switch(True),
    "mid_block_add_attention": _switch(True),
}


_TRANSFORMERS = _without_meaning("of transformers' generation, pooling or training, not of a text encoder's states")
_TEXT_KEYS: dict[str, Key] = {
    "vocab_size": _count(49408),
    "hidden_size": _count(512),
    "intermediate_size": _count(2048),
    "projection_dim": _count(512),
    "num_hidden_layers": _count(12),
    "num_attention_heads": _count(8),
    "max_position_embeddings": _count(77),
    "hidden_act": _activation("quick_gelu"),
    "layer_norm_eps": _number(1e-5),
    "eos_token_id": Key(49407, lambda v: _is_count(v, 0), "an integer from 0"),
}
_TEXT_HONOURED = list(_TEXT_KEYS.values())
TEXT_KEYS: dict[str, Key] = {
    **_TEXT_KEYS,
    "model_type": _only("clip_text_model"),
    "architectures": _BOOKKEEPING,
    "transformers_version": _BOOKKEEPING,
    "_name_or_path": _BOOKKEEPING,
    "torch_dtype": _without_meaning("the worker's sdtpu_dtype counts"),
    "dtype": _without_meaning("the worker's sdtpu_dtype counts"),
    "attention_dropout": _TRAINING,
    "dropout": _TRAINING,
    "initializer_factor": _TRAINING,
    "initializer_range": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    **dict.fromkeys(
        ("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "cls_token_id", "mask_token_id"),
        _without_meaning("the tokenizer's files count"),
    ),
    **dict.fromkeys(
        ("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
         "cross_attention_hidden_size", "diversity_penalty", "do_sample", "early_stopping",
         "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
         "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
         "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
         "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
         "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "suppress_tokens",
         "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
         "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16", "use_cache",
         "_attn_implementation_autoset", "attn_implementation"),
        _TRANSFORMERS,
    ),
}  # fmt: skip


def read_config(config: Mapping[str, Any], keys: Mapping[str, Key], what: str) -> SimpleNamespace:
    """Return a config with a value for every key.

    Args:
        config: as the JSON has it.
        keys: those that the class has.
        what: which config, for the error.

    Raises:
        InvalidCheckpoint: a key is not known, or a value is not honoured.
    """
    for name, value in config.items():
        if name not in keys:
            raise InvalidCheckpoint(
                f"{what}: the key {brief(name)} ({brief(value)}) is not known, so the model cannot be computed as the"
                " config says; if it changes no pixel, remove it from the config"
            )
        if not keys[name].allows(value):
            raise InvalidCheckpoint(f"{what}: {name} must be {keys[name].allowed}, got {brief(value)}")
    return SimpleNamespace(**{name: config.get(name, key.default) for name, key in keys.items()})


def read_unet_config(config: Mapping[str, Any], what: str = "unet/config.json") -> SimpleNamespace:
    """Return the config of a `UNet2DConditionModel`, with what follows from it by block.

    Besides the keys of the config it has, each with one entry for every block on the way down: `heads`,
    `context_widths`, `layers`, `only_cross` and `transformer_layers`; and `transformer_layers_up`, on the way up.

    Raises:
        InvalidCheckpoint: see `read_config`; or two keys do not fit each other.
    """
    read = read_config(config, UNET_KEYS, what)
    count = len(read.block_out_channels)
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    read.down_block_types = read.down_block_types or down
    read.up_block_types = read.up_block_types or ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3

    def by_block(name: str) -> list[Any]:
        value = getattr(read, name)
        values = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise InvalidCheckpoint(
                f"{what}: {name} must have an entry for each of the {count} blocks, got {brief(value)}"
            )
        return values

    for name in ("down_block_types", "up_block_types"):
        by_block(name)
    # The config's `attention_head_dim` is the number of heads: a misnomer that every checkpoint keeps.
    read.heads = by_block("attention_head_dim")
    read.context_widths, read.only_cross = by_block("cross_attention_dim"), by_block("only_cross_attention")
    read.layers = by_block("layers_per_block")
    per_block = by_block("transformer_layers_per_block")
    read.transformer_layers = [_for_each(value, read.layers[i], what) for i, value in enumerate(per_block)]
    if read.reverse_transformer_layers_per_block is not None:
        upwards = by_block("reverse_transformer_layers_per_block")
    else:
        upwards = per_block[::-1]
    read.transformer_layers_up = [
        _for_each(value, read.layers[count - 1 - i] + 1, what) for i, value in enumerate(upwards)
    ]
    if read.addition_embed_type and not (read.addition_time_embed_dim and read.projection_class_embeddings_input_dim):
        raise InvalidCheckpoint(
            f"{what}: addition_embed_type needs addition_time_embed_dim and projection_class_embeddings_input_dim"
        )
    return read


def read_autoencoder_config(config: Mapping[str, Any], what: str = "vae/config.json") -> SimpleNamespace:
    """Return the config of an `AutoencoderKL`.

    Raises:
        InvalidCheckpoint: see `read_config`.
    """
    return read_config(config, AUTOENCODER_KEYS, what)


def read_text_config(config: Mapping[str, Any], what: str = "text_encoder/config.json") -> Any:
    """Return the config of a CLIP text encoder, a `transformers.CLIPTextConfig`.

    Raises:
        InvalidCheckpoint: see `read_config`.
    """
    from transformers import CLIPTextConfig

    read = read_config(config, TEXT_KEYS, what)
    given = {name: value for name, value in vars(read).items() if name in config and TEXT_KEYS[name] in _TEXT_HONOURED}
    return CLIPTextConfig(**given)


def _for_each(value: Any, count: int, what: str) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise InvalidCheckpoint(
            f"{what}: transformer_layers_per_block must have {count} numbers for a block of {count} layers, got"
            f" {brief(value)}"
        )
    return values
