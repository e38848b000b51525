"""Tiny configs of every variant of every network, as the oracle and the tests both read them. Data only."""

from __future__ import annotations

from typing import Any

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
}
_XL: dict[str, Any] = {
    **_UNET,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}

UNETS: dict[str, dict[str, Any]] = {
    "sd1": _UNET,
    "sd2": {**_UNET, "attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "xl": _XL,
    "inpainting": {**_UNET, "in_channels": 9},
    "instruct": {**_UNET, "in_channels": 8},
    "lcm": {**_UNET, "time_cond_proj_dim": 12},
    "two-layers": {**_UNET, "layers_per_block": 2, "block_out_channels": [32, 32]},
    "layers-by-block": {**_UNET, "layers_per_block": [1, 2]},
    "only-cross": {**_UNET, "only_cross_attention": [True, False]},
    "all-cross": {
        **_UNET, "only_cross_attention": True, "mid_block_only_cross_attention": False,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    },
    "no-mid": {**_UNET, "mid_block_type": None},
    "odd-size": {**_UNET, "sample_size": 7},
    "wide-size": {**_UNET, "sample_size": [4, 10]},
    "padding-0": {**_UNET, "downsample_padding": 0},
    "centred": {**_UNET, "center_input_sample": True},
    "sines-first": {**_UNET, "flip_sin_to_cos": False, "freq_shift": 1},
    "norm-eps": {**_UNET, "norm_eps": 1e-3, "norm_num_groups": 8},
    "mish": {**_UNET, "act_fn": "mish"},
    "gelu": {**_UNET, "act_fn": "gelu"},
    "mid-scale": {**_UNET, "mid_block_scale_factor": 2.0},
    "scale-shift": {**_UNET, "resnet_time_scale_shift": "scale_shift"},
    "post-act": {**_UNET, "timestep_post_act": "silu", "time_embedding_act_fn": "silu"},
    "context-by-block": {**_UNET, "cross_attention_dim": [24, 24]},
    "ssd": {
        **_XL, "transformer_layers_per_block": [1, [1, 2], 2],
        "reverse_transformer_layers_per_block": [[2, 2, 1], [2, 1, 1], 1],
    },
}  # fmt: skip

_VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
VAES: dict[str, dict[str, Any]] = {
    "sd": _VAE,
    "deep": {**_VAE, "block_out_channels": [8, 16, 16, 24], "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2},
    "no-quant": {**_VAE, "use_quant_conv": False, "use_post_quant_conv": False},
    "no-attention": {**_VAE, "mid_block_add_attention": False},
    "wide-latents": {**_VAE, "latent_channels": 16},
}  # fmt: skip

_TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 12, "hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
    "projection_dim": 24,
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "clip-l": _TEXT,
    "openclip-h": {**_TEXT, "hidden_act": "gelu"},
    "projection": {**_TEXT, "hidden_act": "gelu", "projection": True},
    "eos": {**_TEXT, "eos_token_id": 99, "projection": True},
    "eps": {**_TEXT, "layer_norm_eps": 1e-3},
}
TEXT_IDS = [[98, 5, 7, 99, 1, 1, 1, 1, 1, 1, 1, 1], [98, 3, 50, 60, 70, 80, 10, 11, 12, 13, 14, 99]]

CHECKERS: dict[str, dict[str, Any]] = {
    "small": {
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 8, "projection_dim": 12, "hidden_act": "quick_gelu"},
        "projection_dim": 12,
    },
}  # fmt: skip
