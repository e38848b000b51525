"""The configs of tiny checkpoints with random weights, as data: neither JAX nor torch is needed to read them."""

from __future__ import annotations

import json
from typing import Any

from tests.support.paths import ROOT

SHIPPED = ROOT / "sdtpu_worker" / "checkpoint"
STABLE_DIFFUSION_NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
UNET: dict[str, Any] = {
    "sample_size": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
XL_UNET: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": 32 + 16,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
LCM_UNET: dict[str, Any] = {**UNET, "time_cond_proj_dim": 16}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "sample_size": 8,
}

TINY_VAE: dict[str, Any] = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}


def _text_config(width: int) -> dict[str, Any]:
    vocabulary = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text())
    return {
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "eos_token_id": vocabulary["<|endoftext|>"],
    }


TEXT = _text_config(32)
TEXT_2 = {**_text_config(16), "projection_dim": 24, "hidden_act": "gelu"}
