"""Checkpoints of random weights in the diffusers layout, for tests that need a model of a certain kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from flax.serialization import to_bytes
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, FlaxCLIPTextModel

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


def make_random_checkpoint(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    sampler_class: str = "PNDMScheduler",
    safety_checker: bool = False,
) -> Path:
    """Write a tiny Stable Diffusion with random weights and the shipped tokenizer; return its folder."""
    index: dict[str, Any] = {
        "_class_name": "FlaxStableDiffusionPipeline",
        "scheduler": ["diffusers", f"Flax{sampler_class}"],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "FlaxUNet2DConditionModel"],
        "vae": ["diffusers", "FlaxAutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer")
    unet_config = {
        "sample_size": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    }
    vae_config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "sample_size": 8,
    }
    text_config = CLIPTextConfig(
        vocab_size=len(json.loads((folder / "tokenizer" / "vocab.json").read_text())),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    unet, vae = FlaxUNet2DConditionModel(**unet_config), FlaxAutoencoderKL(**vae_config)
    text_encoder = FlaxCLIPTextModel(text_config, _do_init=False)
    _write(folder / "unet", {"_class_name": "FlaxUNet2DConditionModel", **unet_config}, unet.init_weights)
    _write(folder / "vae", {"_class_name": "FlaxAutoencoderKL", **vae_config}, vae.init_weights)
    _write(folder / "text_encoder", text_config.to_dict(), lambda key: text_encoder.init_weights(key, (1, 77)))
    scheduler = {"_class_name": f"Flax{sampler_class}", **STABLE_DIFFUSION_NOISE, "prediction_type": prediction_type}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if safety_checker:
        index["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        _write_safety_checker(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_safety_checker(folder: Path) -> None:
    from sdtpu_worker.diffusion.checkpoint import safety_checker_class

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "projection_dim": 16}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config={"projection_dim": 16}, projection_dim=16)
    checker = safety_checker_class()(config, input_shape=(1, 32, 32, 3), _do_init=False)
    _write(folder / "safety_checker", config.to_dict(), lambda key: checker.init_weights(key, (1, 32, 32, 3)))
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "feature_extractor")


def _write(folder: Path, config: dict[str, Any], init: Callable[[jax.Array], Any]) -> None:
    """Write a config and random weights; drawing them with NumPy is much faster than running the initialisers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(len(folder.name))

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("bias", "scale"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 1.0
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))
    name = "flax_model.msgpack" if folder.name in ("text_encoder", "safety_checker") else "diffusion_flax_model.msgpack"
    (folder / name).write_bytes(to_bytes(params))
