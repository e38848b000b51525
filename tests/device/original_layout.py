"""A checkpoint folder's tensors in one file, under the names of the original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from sdtpu_worker.diffusion.original_names import autoencoder_name, unet_names
from sdtpu_worker.diffusion.single_file_configs import Architecture

_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
          "mlp.fc2": "mlp.c_proj"}  # fmt: skip
_ENDS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def part(folder: Path, name: str) -> dict[str, np.ndarray]:
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def to_single_file(folder: Path, file: Path, open_clip: str | None, dtype: Any = None, **more: np.ndarray) -> None:
    """Write a checkpoint's tensors to one file.

    Args:
        folder: in the diffusers layout.
        file: to write.
        open_clip: the part that is an OpenCLIP text encoder in the original code; None for a CLIP-L alone.
        dtype: of the file.
        **more: further tensors; two underscores stand for a dot.
    """
    unet = part(folder, "unet")
    original = {today: name for name, today in unet_names(unet).items()}
    tensors = {f"model.diffusion_model.{original[name]}": value for name, value in unet.items()}
    count = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    for name, value in part(folder, "vae").items():
        is_attention = ".attentions." in name and name.endswith("weight") and value.ndim == 2
        tensors[f"first_stage_model.{autoencoder_name(name, count)}"] = (
            value[:, :, None, None] if is_attention else value
        )
    is_xl = (folder / "text_encoder_2").exists()
    prefix = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    if open_clip != "text_encoder":
        tensors |= {f"{prefix}{name}": value for name, value in part(folder, "text_encoder").items()}
    if open_clip:
        prefix = "conditioner.embedders.1.model." if is_xl else "cond_stage_model.model."
        tensors |= {f"{prefix}{name}": value for name, value in to_open_clip(part(folder, open_clip)).items()}
    tensors |= {name.replace("__", "."): value for name, value in more.items()}
    if dtype is not None:
        tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)


def to_open_clip(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a text encoder's tensors as OpenCLIP has them."""
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name in _ENDS:
            found[_ENDS[name]] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.T
        elif "q_proj" in name:
            layer, kind = name.split(".")[3], name.rpartition(".")[2]
            three = [tensors[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = np.concatenate(three)
        elif not any(which in name for which in ("k_proj", "v_proj")):
            layer = name.split(".")[3]
            for today, original in _LAYER.items():
                if f".{today}." in name:
                    found[f"transformer.resblocks.{layer}.{original}.{name.rpartition('.')[2]}"] = value
    return found


def tiny_architecture(like: Architecture, folder: Path) -> Architecture:
    """Return an architecture with the configs of a tiny checkpoint, and signs that its file has."""
    import dataclasses

    def read(name: str) -> dict[str, Any]:
        config = json.loads((folder / name / "config.json").read_text())
        return {key: value for key, value in config.items() if key != "architectures"}

    unet = part(folder, "unet")
    sign = next(name for name in unet if name.endswith("attn2.to_k.weight"))
    original = {today: name for name, today in unet_names(unet).items()}[sign]
    return dataclasses.replace(
        like,
        signs={f"model.diffusion_model.{original}": unet[sign].shape},
        configs={name: read(name) for name in like.configs},
    )
