"""Tiny models of every kind, as data: `tools/oracle/models.py` makes PyTorch's outputs of them, tests compare ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.random_weights import random_input

BATCH, TOKENS = 2, 7

_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

_TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": [_CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
_XL: dict[str, Any] = {
    **_TINY,
    "down_block_types": [_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _UP],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}
_THREE: dict[str, Any] = {
    **_TINY,
    "block_out_channels": [8, 16, 24],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP],
}

# Without transformers, which none of what is tried here concerns: a third of the time to compile.
_PLAIN: dict[str, Any] = {
    **_TINY,
    "down_block_types": [_DOWN, _DOWN],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [_UP, _UP],
}

# By name, as in a `config.json`.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": _TINY,
    "sd2": {**_TINY, "attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "sd1-three-levels": {**_THREE, "layers_per_block": 2},
    "sd1-odd-sizes": _THREE,
    "sd1-inpainting": {**_TINY, "in_channels": 9},
    "sd1-instruct-pix2pix": {**_TINY, "in_channels": 8},
    "sd1-lcm": {**_TINY, "time_cond_proj_dim": 6},
    "sd1-no-middle": {**_TINY, "mid_block_type": None},
    "sd1-plain-middle": {**_TINY, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.5},
    "xl": _XL,
    "xl-lcm": {**_XL, "time_cond_proj_dim": 6},
    "xl-refiner": {
        **_XL,
        "block_out_channels": [8, 16, 24],
        "down_block_types": [_DOWN, _CROSS_DOWN, _DOWN],
        "up_block_types": [_UP, _CROSS_UP, _UP],
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 10 + 5 * 8,
    },
    "xl-ssd": {
        **_XL,
        "block_out_channels": [8, 16, 24],
        "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
        "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
        "attention_head_dim": [2, 4, 4],
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 1], [1, 2]],
        "reverse_transformer_layers_per_block": [[2, 1, 1], [1, 2, 1], 1],
    },
    "xl-lists-by-layer": {
        **_XL,
        "transformer_layers_per_block": [1, [2, 3]],
        "reverse_transformer_layers_per_block": [[1, 2], 1],
    },
    "only-cross-attention": {**_THREE, "only_cross_attention": [True, False, True]},
    "only-cross-attention-everywhere": {**_TINY, "only_cross_attention": True},
    "lists-by-block": {
        **_THREE,
        "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN],
        "up_block_types": [_CROSS_UP, _CROSS_UP, _CROSS_UP],
        "layers_per_block": [1, 2, 1],
        "cross_attention_dim": [12, 12, 12],
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 2, 1],
    },
    "scale-shift": {**_PLAIN, "resnet_time_scale_shift": "scale_shift"},
    "downsample-padding": {**_PLAIN, "downsample_padding": 0},
    "center-input": {**_PLAIN, "center_input_sample": True},
    "sine-first": {**_PLAIN, "flip_sin_to_cos": False, "freq_shift": 1},
    "gelu": {**_PLAIN, "act_fn": "gelu"},
    "relu": {**_PLAIN, "act_fn": "relu"},
    "mish": {**_PLAIN, "act_fn": "mish"},
    "swish": {**_PLAIN, "act_fn": "swish"},
    "post-act": {**_PLAIN, "timestep_post_act": "gelu", "time_embedding_act_fn": "silu", "time_embedding_dim": 20},
    "mid-scale": {**_PLAIN, "mid_block_scale_factor": 1.4142},
    "norms": {**_TINY, "norm_eps": 0.1, "norm_num_groups": 2},
    "kernels": {**_PLAIN, "conv_in_kernel": 1, "conv_out_kernel": 5, "out_channels": 3},
}
# Of the latents, where it is not 8 × 8.
UNET_SIZES: dict[str, tuple[int, int]] = {"sd1-odd-sizes": (7, 9), "sd1-inpainting": (8, 4)}


CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": [8, 16],
        "down_block_types": [_CROSS_DOWN, _DOWN],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "conditioning_embedding_out_channels": [4, 8],
    },
    "sd2-bgr": {
        "block_out_channels": [8, 16],
        "down_block_types": [_CROSS_DOWN, _CROSS_DOWN],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "controlnet_conditioning_channel_order": "bgr",
        "conditioning_embedding_out_channels": [4, 8, 8],
        "global_pool_conditions": True,
    },
    "xl": {
        "block_out_channels": [8, 16],
        "down_block_types": [_DOWN, _CROSS_DOWN],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 10 + 6 * 8,
        "conditioning_embedding_out_channels": [4, 8],
    },
}


def controlnet_inputs(name: str) -> dict[str, Any]:
    """Return the inputs of a ControlNet in `CONTROLNETS` and, under `picture`, its picture: float32, images NHWC."""
    config = CONTROLNETS[name]
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    inputs: dict[str, Any] = {
        "sample": random_input(f"control {name}", (BATCH, 8, 8, 4)),
        "timesteps": np.array([1.0, 501.0], np.float32),
        "context": random_input(f"control {name} context", (BATCH, TOKENS, 12)),
        "picture": np.abs(random_input(f"control {name} picture", (BATCH, 8 * factor, 8 * factor, 3), 0.5)),
    }
    if "addition_embed_type" in config:
        inputs["text_embeds"] = random_input(f"control {name} text", (BATCH, 10))
        inputs["time_ids"] = np.arange(BATCH * 6, dtype=np.float32).reshape(BATCH, 6) * 64
    return inputs


def unet_inputs(name: str) -> dict[str, Any]:
    """Return the inputs of a UNet in `UNETS`: float32, images NHWC."""
    config = UNETS[name]
    contexts = config["cross_attention_dim"]
    features = contexts if isinstance(contexts, int) else contexts[0]
    inputs = {
        "sample": random_input(name, (BATCH, *UNET_SIZES.get(name, (8, 8)), config.get("in_channels", 4))),
        "timesteps": np.array([1.0, 501.0], np.float32),
        "context": random_input(f"{name} context", (BATCH, TOKENS, features)),
    }
    if "addition_embed_type" in config:
        count = 5 if name == "xl-refiner" else 6
        inputs["text_embeds"] = random_input(f"{name} text", (BATCH, 10))
        inputs["time_ids"] = np.arange(BATCH * count, dtype=np.float32).reshape(BATCH, count) * 64
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = random_input(f"{name} guidance", (BATCH, config["time_cond_proj_dim"]))
    return inputs


_CLIP: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
    "projection_dim": 12,
}
CLIPS: dict[str, dict[str, Any]] = {
    "clip-l": _CLIP,
    "clip-gelu": {**_CLIP, "hidden_act": "gelu", "num_attention_heads": 4},
    "clip-eos": {**_CLIP, "eos_token_id": 40},
    "clip-projection": {**_CLIP, "hidden_act": "gelu", "eos_token_id": 49, "layer_norm_eps": 1e-3},
}


def has_projection(name: str) -> bool:
    """Return whether the text encoder of that name has a projection."""
    return name == "clip-projection"


def clip_inputs(name: str) -> np.ndarray:
    """Return token ids `(B, L) int32`: one text ends with the largest id, twice, and one with the id 40 before it."""
    return np.array([[48, 5, 6, 7, 49, 49, 49, 49, 49], [48, 9, 40, 3, 40, 8, 49, 0, 0]], np.int32)


_VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VAES: dict[str, dict[str, Any]] = {
    "vae": _VAE,
    "vae-three-levels": {
        **_VAE,
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
    },
    "vae-sixteen-channels": {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "vae-without-attention": {**_VAE, "mid_block_add_attention": False, "act_fn": "gelu"},
}

TINY_VAES: dict[str, dict[str, Any]] = {
    "tiny": {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [8, 8, 8],
        "decoder_block_out_channels": [12, 12],
        "num_encoder_blocks": [1, 0, 2],
        "num_decoder_blocks": [2, 1],
        "latent_channels": 5,
    },
    "tiny-gelu": {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
        "act_fn": "gelu",
    },
}


def vae_inputs(name: str) -> dict[str, np.ndarray]:
    """Return latents and an image for an autoencoder in `VAES` or `TINY_VAES`: float32, NHWC."""
    channels = {**VAES, **TINY_VAES}[name].get("latent_channels", 4)
    return {
        "latents": random_input(f"{name} latents", (1, 4, 6, channels)),
        "image": random_input(f"{name} image", (1, 16, 12, 3), 0.5),
    }


SAFETY_CHECKER: dict[str, Any] = {
    "projection_dim": 12,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
        "projection_dim": 12,
    },
}


def safety_inputs() -> np.ndarray:
    """Return sixty-four pictures `(64, 8, 8, 3) float32`, of which some are flagged."""
    return random_input("safety", (64, 8, 8, 3))
