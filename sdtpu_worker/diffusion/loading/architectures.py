"""The configs of the architectures that single files come in, which such a file does not hold.

They are those of the public checkpoints: stable-diffusion-v1-5, stable-diffusion-2-1 (and -base), and
stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}
_SD_BLOCKS: Config = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
}
UNETS: dict[str, Config] = {
    "sd1": {**_UNET, **_SD_BLOCKS, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "sd2": {
        **_UNET,
        **_SD_BLOCKS,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_UNET,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
        "use_linear_projection": True,
    },
}

_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SD_VAE: Config = {**_VAE, "sample_size": 512, "scaling_factor": 0.18215}
_XL_VAE: Config = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
VAES: dict[str, Config] = {"sd1": _SD_VAE, "sd2": _SD_VAE, "sdxl": _XL_VAE}

_CLIP: Config = {
    "model_type": "clip_text_model",
    "bos_token_id": 0,
    "eos_token_id": 2,  # means "the highest id" to transformers, for configs of that time
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
CLIP_L: Config = {
    **_CLIP,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
OPENCLIP_H: Config = {
    **_CLIP,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPENCLIP_BIGG: Config = {
    **_CLIP,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
TEXT_ENCODERS: dict[str, dict[str, Config]] = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": OPENCLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG},
}
# What fills a prompt up, by tokenizer.
PADDING = {
    "sd1": {"tokenizer": "<|endoftext|>"},
    "sd2": {"tokenizer": "!"},
    "sdxl": {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
}

_NOISE: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_PNDM: Config = {**_NOISE, "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
_DDIM: Config = {**_NOISE, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
_EULER: Config = {**_NOISE, "_class_name": "EulerDiscreteScheduler"}


def scheduler_config(architecture: str, prediction_type: str) -> Config:
    """Return the scheduler config of the public checkpoint of that architecture and prediction type."""
    if architecture == "sdxl":
        base = _EULER
    else:
        base = _DDIM if (architecture, prediction_type) == ("sd2", "v_prediction") else _PNDM
    return {**base, "prediction_type": prediction_type}
