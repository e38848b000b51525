"""The keys of each model's config, with what is done about them."""

from __future__ import annotations

from sdtpu_worker.models.config_rules import (
    Rule,
    Rules,
    count,
    counts,
    flag,
    irrelevant,
    list_of,
    names,
    number,
    one_of,
    only,
)
from sdtpu_worker.models.layers import ACTIVATIONS

_TRAINING = irrelevant("concerns training alone")
_RECORD = irrelevant("says where the file comes from")
_ACTIVATION = one_of(*(name for name in ACTIVATIONS if name != "quick_gelu"))
_OPTIONAL_ACTIVATION = one_of(None, *(name for name in ACTIVATIONS if name != "quick_gelu"))

# What diffusers writes into every file.
_FLAX = irrelevant("concerns diffusers' Flax models, how they compute and not what")
_DIFFUSERS: Rules = {
    **dict.fromkeys(
        (
            "decay",
            "inv_gamma",
            "max_value",
            "min_decay",
            "optimization_step",
            "power",
            "update_after_step",
            "use_ema_warmup",
        ),
        irrelevant("is left by the averaging of weights during training"),
    ),
    "dtype": irrelevant("the dtype is the worker's setting sdtpu_dtype"),
    "_diffusers_version": _RECORD,
    "_name_or_path": _RECORD,
    "_use_default_values": irrelevant("lists keys that have diffusers' defaults, which are the defaults here"),
    "_commit_hash": _RECORD,
}

UNET: Rules = {
    **_DIFFUSERS,
    "_class_name": one_of("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": _ACTIVATION,
    "addition_embed_type": only(None, "text_time"),
    "addition_embed_type_num_heads": irrelevant("concerns the addition embedding of type text alone"),
    "addition_time_embed_dim": count(null=True),
    "attention_head_dim": counts(depth=1),
    "attention_type": only("default"),
    "block_out_channels": list_of("whole numbers from 1", counts(depth=0).accepts),
    "center_input_sample": flag(),
    "class_embed_type": only(None),
    "class_embeddings_concat": only(False),
    "conv_in_kernel": one_of(1, 3, 5, 7),
    "conv_out_kernel": one_of(1, 3, 5, 7),
    "cross_attention_dim": counts(depth=1),
    "cross_attention_norm": only(None),
    "down_block_types": names("DownBlock2D", "CrossAttnDownBlock2D"),
    "downsample_padding": only(0, 1),
    "dropout": _TRAINING,
    "dual_cross_attention": only(False),
    "encoder_hid_dim": only(None),
    "encoder_hid_dim_type": only(None),
    "flip_sin_to_cos": flag(),
    "freq_shift": number(),
    "in_channels": count(),
    "layers_per_block": counts(depth=1),
    "mid_block_only_cross_attention": irrelevant("diffusers reads it for a kind of middle block that is not allowed"),
    "mid_block_scale_factor": number("a number above 0", above=0),
    "mid_block_type": only("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "norm_eps": number("a number above 0", above=0),
    "norm_num_groups": count(),
    "num_attention_heads": only(None),
    "num_class_embeds": irrelevant("concerns class embeddings alone, which are not allowed"),
    "only_cross_attention": Rule(
        "honoured",
        "true or false, or a list with one for each block",
        lambda v: isinstance(v, bool) or (isinstance(v, list | tuple) and all(isinstance(item, bool) for item in v)),
    ),
    "out_channels": count(),
    "projection_class_embeddings_input_dim": count(null=True),
    "resnet_out_scale_factor": only(1),
    "resnet_skip_time_act": only(False),
    "resnet_time_scale_shift": only("default", "scale_shift"),
    "reverse_transformer_layers_per_block": counts(depth=2, least=0, null=True),
    "sample_size": Rule(
        "honoured",
        "a whole number from 1, a list of two (height, width), or null",
        lambda v: v is None or (counts(depth=1).accepts(v) and (isinstance(v, int) or len(v) == 2)),
    ),
    "time_cond_proj_dim": count(null=True),
    "time_embedding_act_fn": _OPTIONAL_ACTIVATION,
    "time_embedding_dim": count(null=True),
    "time_embedding_type": only("positional"),
    "timestep_post_act": _OPTIONAL_ACTIVATION,
    "transformer_layers_per_block": counts(depth=2, least=0),
    "up_block_types": names("UpBlock2D", "CrossAttnUpBlock2D"),
    "upcast_attention": irrelevant("scores and softmax are float32 here always"),
    "split_head_dim": _FLAX,
    "use_linear_projection": flag(),
    "use_memory_efficient_attention": _FLAX,
}

_OF_CONTROLNETS = (
    "act_fn", "addition_embed_type", "addition_embed_type_num_heads", "addition_time_embed_dim", "attention_head_dim",
    "block_out_channels", "class_embed_type", "cross_attention_dim", "down_block_types", "downsample_padding",
    "encoder_hid_dim", "encoder_hid_dim_type", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
    "mid_block_scale_factor", "norm_eps", "norm_num_groups", "num_attention_heads", "num_class_embeds",
    "only_cross_attention", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "transformer_layers_per_block", "upcast_attention", "use_linear_projection",
)  # fmt: skip
CONTROLNET: Rules = {
    **_DIFFUSERS,
    **{key: UNET[key] for key in _OF_CONTROLNETS},
    "_class_name": one_of("ControlNetModel"),
    "conditioning_channels": only(3),
    "conditioning_embedding_out_channels": list_of("whole numbers from 1", counts(depth=0).accepts),
    "controlnet_conditioning_channel_order": only("rgb", "bgr"),
    "global_pool_conditions": flag(),
    "mid_block_type": only("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "sample_size": irrelevant("the size of images comes from the UNet's config and from settings"),
}

_LATENT_STATISTICS = Rule(
    "honoured",
    "null, or a list of numbers with one for each latent channel",
    lambda v: v is None or (isinstance(v, list | tuple) and all(number().accepts(item) for item in v)),
)

AUTOENCODER: Rules = {
    **_DIFFUSERS,
    "_class_name": one_of("AutoencoderKL", "FlaxAutoencoderKL"),
    "act_fn": _ACTIVATION,
    "block_out_channels": list_of("whole numbers from 1", counts(depth=0).accepts),
    "down_block_types": names("DownEncoderBlock2D"),
    "force_upcast": flag(),
    "in_channels": only(3),
    "latent_channels": count(),
    "latents_mean": _LATENT_STATISTICS,
    "latents_std": _LATENT_STATISTICS,
    "layers_per_block": count(),
    "mid_block_add_attention": flag(),
    "norm_num_groups": count(),
    "out_channels": only(3),
    "sample_size": irrelevant("the size of images comes from the UNet's config and from settings"),
    "scaling_factor": number("a number above 0", above=0),
    "shift_factor": number("a number or null", null=True),
    "up_block_types": names("UpDecoderBlock2D"),
    "use_post_quant_conv": flag(),
    "use_quant_conv": flag(),
}

AUTOENCODER_TINY: Rules = {
    **_DIFFUSERS,
    "_class_name": one_of("AutoencoderTiny"),
    "act_fn": _ACTIVATION,
    "block_out_channels": irrelevant("repeats decoder_block_out_channels"),
    "decoder_block_out_channels": list_of("whole numbers from 1", counts(depth=0).accepts),
    "encoder_block_out_channels": list_of("whole numbers from 1", counts(depth=0).accepts),
    "force_upcast": flag(),
    "in_channels": only(3),
    "latent_channels": count(),
    "latent_magnitude": irrelevant("concerns latents that are stored as bytes"),
    "latent_shift": irrelevant("concerns latents that are stored as bytes"),
    "num_decoder_blocks": list_of("whole numbers from 0", count(least=0).accepts),
    "num_encoder_blocks": list_of("whole numbers from 0", count(least=0).accepts),
    "out_channels": only(3),
    "scaling_factor": number("a number above 0", above=0),
    "shift_factor": number("a number or null", null=True),
    "upsample_fn": only("nearest"),
    "upsampling_scaling_factor": only(2),
}

# What transformers writes, or wrote, into every file: how text is generated, heads of other models, records.
_GENERATION = irrelevant("concerns models that write text")
_OTHER_HEAD = irrelevant("concerns heads and outputs that are not used")
_TRANSFORMERS: Rules = {
    **dict.fromkeys(
        (
            "_class_name",
            "_name_or_path",
            "_commit_hash",
            "architectures",
            "dtype",
            "torch_dtype",
            "transformers_version",
            "_diffusers_version",
        ),
        _RECORD,
    ),
    **dict.fromkeys(("attention_dropout", "dropout", "initializer_factor", "initializer_range"), _TRAINING),
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "decoder_start_token_id",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "remove_invalid_values",
            "repetition_penalty",
            "sep_token_id",
            "suppress_tokens",
            "temperature",
            "tf_legacy_loss",
            "top_k",
            "top_p",
            "typical_p",
            "use_cache",
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        (
            "chunk_size_feed_forward",
            "cross_attention_hidden_size",
            "finetuning_task",
            "id2label",
            "is_encoder_decoder",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "prefix",
            "problem_type",
            "return_dict",
            "return_dict_in_generate",
            "task_specific_params",
            "tie_encoder_decoder",
            "tie_word_embeddings",
            "tokenizer_class",
            "torchscript",
            "use_bfloat16",
            "bos_token_id",
            "pad_token_id",
        ),
        _OTHER_HEAD,
    ),
    "add_cross_attention": only(False),
    "is_decoder": only(False),
    "pruned_heads": only({}, None),
}

_CLIP: Rules = {
    **_TRANSFORMERS,
    "hidden_act": only("quick_gelu", "gelu"),
    "hidden_size": count(),
    "intermediate_size": count(),
    "layer_norm_eps": number("a number above 0", above=0),
    "num_attention_heads": count(),
    "num_hidden_layers": count(),
    "projection_dim": count(),
}

CLIP_TEXT: Rules = {
    **_CLIP,
    "model_type": one_of("clip_text_model"),
    "eos_token_id": count(least=0),
    "max_position_embeddings": count(),
    "vocab_size": count(),
}

CLIP_VISION: Rules = {
    **_CLIP,
    "model_type": one_of("clip_vision_model"),
    "eos_token_id": _GENERATION,
    "image_size": count(),
    "num_channels": only(3),
    "patch_size": count(),
}

SAFETY_CHECKER: Rules = {
    **_TRANSFORMERS,
    "eos_token_id": _GENERATION,
    "logit_scale_init_value": _TRAINING,
    "model_type": one_of("clip", "clip_vision_model"),
    "projection_dim": count(),
    "text_config": irrelevant("the checker looks at images alone"),
    "text_config_dict": irrelevant("the checker looks at images alone"),
    "vision_config": Rule("honoured", "an object", lambda v: isinstance(v, dict)),
    "vision_config_dict": Rule("honoured", "an object or null", lambda v: v is None or isinstance(v, dict)),
}
