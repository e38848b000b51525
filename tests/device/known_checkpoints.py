"""The configs of checkpoints that people have: facts, from their `config.json` files.

`FROM_FILES` names those whose UNet config was read from a copy of the file itself. The others' keys are those that the
release of diffusers wrote at the time, and the sizes are those by which other programs recognise the same checkpoint.
Paths and versions of libraries are left out where they say nothing.
"""

from __future__ import annotations

from typing import Any

_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

# What diffusers 0.2 to 0.8 wrote.
_SD1: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
}
# What diffusers 0.10 to 0.12 added.
_SD1_LATER: dict[str, Any] = {
    **_SD1,
    "_diffusers_version": "0.10.2",
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
# What diffusers 0.15 added, and later releases on top of it.
_LATER: dict[str, Any] = {
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_LATEST: dict[str, Any] = {
    **_LATER,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "dropout": 0.0,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None,
    "time_embedding_dim": None,
    "transformer_layers_per_block": 1,
}
_SD2: dict[str, Any] = {
    **_SD1,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
_BK: dict[str, Any] = {**_SD1_LATER, **_LATER, "_diffusers_version": "0.15.0", "layers_per_block": 1}
_BK_TINY: dict[str, Any] = {
    **_BK,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [_CROSS_DOWN] * 3,
    "mid_block_type": None,
    "up_block_types": [_CROSS_UP] * 3,
}
_XL: dict[str, Any] = {
    **_SD1_LATER,
    **_LATEST,
    "_diffusers_version": "0.24.0.dev0",
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
    "upcast_attention": None,
    "use_linear_projection": True,
}
_XL_REFINER: dict[str, Any] = {
    **_XL,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _UP],
}
_SSD_1B: dict[str, Any] = {
    **_XL,
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
}

UNETS: dict[str, dict[str, Any]] = {
    "CompVis/stable-diffusion-v1-4": _SD1,
    "CompVis/stable-diffusion-v1-4, branch flax": {
        "_class_name": "FlaxUNet2DConditionModel",
        "_diffusers_version": "0.5.0.dev0",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
        "dropout": 0.0,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
    },
    "runwayml/stable-diffusion-v1-5": _SD1,
    "runwayml/stable-diffusion-inpainting": {**_SD1, "in_channels": 9, "sample_size": 32},
    "timbrooks/instruct-pix2pix": {
        **_SD1_LATER,
        "_diffusers_version": "0.12.0.dev0",
        "class_embed_type": None,
        "in_channels": 8,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "resnet_time_scale_shift": "default",
    },
    "prompthero/openjourney": {**_SD1, "_diffusers_version": "0.7.2"},
    "hakurei/waifu-diffusion": {**_SD1, "_diffusers_version": "0.2.4", "sample_size": 32},
    "nitrosocke/Nitro-Diffusion": {**_SD1, "_diffusers_version": "0.8.0.dev0", "sample_size": 32},
    "gsdf/Counterfeit-V2.5": {**_SD1_LATER, "sample_size": 32},
    "wavymulder/portraitplus": {**_SD1_LATER, "_diffusers_version": "0.11.0.dev0"},
    "Lykon/dreamshaper-8": {**_SD1_LATER, **_LATEST},
    "SimianLuo/LCM_Dreamshaper_v7": {**_SD1_LATER, **_LATEST, "time_cond_proj_dim": 256},
    "stabilityai/stable-diffusion-2-base": _SD2,
    "stabilityai/stable-diffusion-2-1-base": _SD2,
    "stabilityai/stable-diffusion-2-1": {**_SD2, "sample_size": 96, "upcast_attention": True},
    "stabilityai/stable-diffusion-2-1, Flax": {
        **_SD2,
        "_class_name": "FlaxUNet2DConditionModel",
        "dropout": 0.0,
        "sample_size": 96,
    },
    "stabilityai/stable-diffusion-2-inpainting": {**_SD2, "in_channels": 9, "sample_size": 32},
    "stabilityai/sd-turbo": {**_SD1_LATER, **_LATEST, **_SD2, "_diffusers_version": "0.24.0.dev0"},
    "nota-ai/bk-sdm-base": _BK,
    "nota-ai/bk-sdm-small": {**_BK, "mid_block_type": None},
    "nota-ai/bk-sdm-tiny": _BK_TINY,
    "nota-ai/bk-sdm-v2-small": {
        **_SD2,
        "layers_per_block": 1,
        "mid_block_type": None,
        "sample_size": 96,
        "upcast_attention": True,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": _XL,
    "stabilityai/stable-diffusion-xl-refiner-1.0": _XL_REFINER,
    "stabilityai/sdxl-turbo": _XL,
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": {**_XL, "in_channels": 9},
    "latent-consistency/lcm-sdxl": {**_XL, "time_cond_proj_dim": 256},
    "playgroundai/playground-v2.5-1024px-aesthetic": _XL,
    "segmind/SSD-1B": _SSD_1B,
    "segmind/Segmind-Vega": {**_XL, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
}
FROM_FILES = {
    "CompVis/stable-diffusion-v1-4, branch flax",
    "runwayml/stable-diffusion-inpainting",
    "timbrooks/instruct-pix2pix",
    "hakurei/waifu-diffusion",
    "nitrosocke/Nitro-Diffusion",
    "gsdf/Counterfeit-V2.5",
    "wavymulder/portraitplus",
    "stabilityai/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1, Flax",
    "stabilityai/stable-diffusion-2-inpainting",
    "nota-ai/bk-sdm-base",
    "nota-ai/bk-sdm-small",
    "nota-ai/bk-sdm-tiny",
    "nota-ai/bk-sdm-v2-small",
    "stabilityai/stable-diffusion-xl-base-1.0",
}

# Numbers of parameters known from elsewhere than from this data: measured on the files, or published by the authors,
# who round. The golden file has the exact ones that PyTorch's models of these configs have.
PARAMETERS = {
    "CompVis/stable-diffusion-v1-4": 859_520_964,
    "stabilityai/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "CLIP-L": 123_060_480,
    "Stable Diffusion": 83_653_863,
}
PARAMETERS_ROUNDED = {  # to two digits
    "nota-ai/bk-sdm-base": 0.58e9,
    "nota-ai/bk-sdm-small": 0.49e9,
    "nota-ai/bk-sdm-tiny": 0.33e9,
    "segmind/SSD-1B": 1.3e9,
}
# Of Segmind-Vega's three parts.
VEGA_BLOCKS = {"down_blocks.": 247e6, "mid_block.": 31e6, "up_blocks.": 460e6}
