"""The configs of the architectures that single files are of: facts of the published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_UNET = "model.diffusion_model."
_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407,
}  # fmt: skip
_OPEN_CLIP_H = {
    **_CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu",
}  # fmt: skip
_OPEN_CLIP_BIG_G = {
    **_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
}  # fmt: skip
_UNET_1: dict[str, Any] = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
_UNET_XL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1,
}  # fmt: skip
_PNDM = {"_class_name": "PNDMScheduler", **_NOISE, "set_alpha_to_one": False, "skip_prk_steps": True}
_DDIM = {"_class_name": "DDIMScheduler", **_NOISE, "set_alpha_to_one": False, "clip_sample": False}
_EULER = {
    "_class_name": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "leading", "prediction_type": "epsilon",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        name: in words.
        signs: original names and shapes by which a file is recognised.
        configs: by part.
        scheduler: its config; without `prediction_type` where files differ in it.
        text_prefixes: by part, of the original names of a text encoder.
        padding: by tokenizer, the token that fills a prompt up.
        is_xl: it has two text encoders.
    """

    name: str
    signs: Mapping[str, tuple[int, ...]]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    text_prefixes: Mapping[str, str]
    padding: Mapping[str, str]
    is_xl: bool = False


CONFIGS = (
    Architecture(
        name="Stable Diffusion 1.x",
        signs={
            f"{_UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        },
        configs={"unet": _UNET_1, "vae": _VAE, "text_encoder": _CLIP_L},
        scheduler={**_PNDM, "prediction_type": "epsilon"},
        text_prefixes={"text_encoder": "cond_stage_model.transformer."},
        padding={"tokenizer": "<|endoftext|>"},
    ),
    Architecture(
        name="Stable Diffusion 2.x",
        signs={
            f"{_UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        configs={
            "unet": {
                **_UNET_1, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "vae": _VAE,
            "text_encoder": _OPEN_CLIP_H,
        },
        scheduler=_DDIM,
        text_prefixes={"text_encoder": "cond_stage_model.model."},
        padding={"tokenizer": "!"},
    ),
    Architecture(
        name="Stable Diffusion XL",
        signs={
            f"{_UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            f"{_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
            f"{_UNET}label_emb.0.0.weight": (1280, 2816),
        },
        configs={
            "unet": _UNET_XL,
            "vae": {**_VAE, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": _CLIP_L,
            "text_encoder_2": _OPEN_CLIP_BIG_G,
        },
        scheduler=_EULER,
        text_prefixes={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        is_xl=True,
    ),
)  # fmt: skip
