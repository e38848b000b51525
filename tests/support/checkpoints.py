"""Checkpoints of random weights in the diffusers layout, for tests that need a model of a certain kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import (
    read_autoencoder_config,
    read_clip_text_config,
    read_controlnet_config,
    read_safety_checker_config,
    read_unet_config,
)
from sdtpu_worker.models.layout import pytorch_shape
from tests.support.random_weights import random_tensor
from tests.support.tiny_configs import SHIPPED, STABLE_DIFFUSION_NOISE, TEXT, TEXT_2, TINY_VAE, UNET, VAE, XL_UNET

__all__ = ["SHIPPED", "STABLE_DIFFUSION_NOISE", "make_random_checkpoint", "write_part"]


def make_random_checkpoint(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    sampler_class: str = "PNDMScheduler",
    safety_checker: bool = False,
    xl: bool = False,
    tiny_vae: bool = False,
    unet: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny Stable Diffusion with random weights and the shipped tokenizer; return its folder.

    Args:
        folder: to write to.
        prediction_type: of the scheduler config.
        sampler_class: of the scheduler config.
        safety_checker: with one.
        xl: of the XL family, with two text encoders.
        tiny_vae: with an `AutoencoderTiny`.
        unet: further keys of the UNet's config.
        scheduler: further keys of the scheduler config.
    """
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", sampler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if tiny_vae else "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer")
    unet_config = {**(XL_UNET if xl else UNET), **(unet or {})}
    write_part(folder / "unet", "UNet2DConditionModel", unet_config)
    if tiny_vae:
        write_part(folder / "vae", "AutoencoderTiny", {"_class_name": "AutoencoderTiny", **TINY_VAE})
    else:
        write_part(folder / "vae", "AutoencoderKL", VAE)
    write_part(folder / "text_encoder", "CLIPTextModel", TEXT)
    if xl:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer_2")
        write_part(folder / "text_encoder_2", "CLIPTextModelWithProjection", TEXT_2)
    config = {"_class_name": sampler_class, **STABLE_DIFFUSION_NOISE, "prediction_type": prediction_type}
    if sampler_class != "PNDMScheduler":
        config = {name: value for name, value in config.items() if name not in ("skip_prk_steps", "clip_sample")}
        config = {
            name: value for name, value in config.items() if name != "set_alpha_to_one" or "DDIM" in sampler_class
        }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **(scheduler or {})}))
    if safety_checker:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        _write_safety_checker(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_random_controlnet(folder: Path, config: Mapping[str, Any], name: str) -> Path:
    """Write a ControlNet whose weights stand for its name; return its folder."""
    network = networks.controlnet(read_controlnet_config(config))
    tensors = {
        tensor: random_tensor(f"{name} {tensor}", pytorch_shape(tensor, shape))
        for tensor, shape in network.shapes.items()
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel", **config}))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def write_part(folder: Path, class_name: str, config: dict[str, Any]) -> None:
    """Write a part's config and random weights, as PyTorch's libraries do."""
    both_halves = (networks.encoder, networks.decoder)
    made = {
        "UNet2DConditionModel": lambda: [networks.unet(read_unet_config(config))],
        "AutoencoderKL": lambda: [make(read_autoencoder_config(config)) for make in both_halves],
        "AutoencoderTiny": lambda: [make(read_autoencoder_config(config)) for make in both_halves],
        "CLIPTextModel": lambda: [networks.text_encoder(read_clip_text_config(config))],
        "CLIPTextModelWithProjection": lambda: [networks.text_encoder(read_clip_text_config(config), True)],
    }[class_name]()
    tensors = {
        name: random_tensor(name, pytorch_shape(name, shape))
        for network in made
        for name, shape in network.shapes.items()
    }
    is_text = class_name.startswith("CLIP")
    folder.mkdir(parents=True)
    kind = {"architectures": [class_name]} if is_text else {"_class_name": class_name}
    (folder / "config.json").write_text(json.dumps({**kind, **config}))
    name = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / name, {"format": "pt"})


def _write_safety_checker(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "projection_dim": 16}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config={"projection_dim": 16}, projection_dim=16)
    network = networks.safety_checker(read_safety_checker_config(config.to_dict()))
    part = folder / "safety_checker"
    part.mkdir()
    (part / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = {name: random_tensor(name, pytorch_shape(name, shape)) for name, shape in network.shapes.items()}
    tensors |= {name: np.ones_like(value) for name, value in tensors.items() if name.endswith("embeds_weights")}
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "feature_extractor")
