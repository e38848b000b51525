"""A checkpoint as diffusers' Flax pipeline reads it: names, layout and formats of before 2026, when that was ended."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file

from sdtpu_worker.models.layout import from_pytorch

_LISTS = r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)\.(\d+)"
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
_CLASSES = re.compile(r'"(StableDiffusionPipeline|UNet2DConditionModel|AutoencoderKL|CLIPTextModel|\w+Scheduler)"')


def write_flax_copy(source: Path, target: Path) -> None:
    """Copy a checkpoint without its LoRAs, with weights as Flax's msgpack and the names of Flax's classes."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("loras"))
    rewrite_as_flax(target)
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        path = target / name
        path.write_text(json.dumps(json.loads(_CLASSES.sub(r'"Flax\1"', path.read_text())), indent=2) + "\n")


def rewrite_as_flax(folder: Path) -> None:
    """Replace the safetensors of a checkpoint by msgpack."""
    for part in _PARTS:
        for path in (folder / part).glob("*.safetensors"):
            stem = "diffusion_flax_model" if part in ("unet", "vae") else "flax_model"
            params = to_flax(load_file(path), old_attention=part == "vae")
            (folder / part / f"{stem}.msgpack").write_bytes(msgpack_serialize(params))
            path.unlink()


def to_flax(tensors: Mapping[str, np.ndarray], old_attention: bool = False) -> dict[str, Any]:
    """Return PyTorch's tensors as nested parameters under Flax's names, in Flax's layout.

    Args:
        tensors: by PyTorch's name, in PyTorch's layout.
        old_attention: the attention has the names that Flax's autoencoder keeps.
    """
    nested: dict[str, Any] = {}
    for name, value in tensors.items():
        *modules, kind = re.sub(_LISTS, r"\1_\2", name).split(".")
        if old_attention:
            modules = [_OLD_ATTENTION.get(module, module) for module in modules]
        weight = "kernel" if value.ndim > 1 else "scale"
        if modules and modules[-1].endswith("_embedding") and value.ndim == 2:
            weight = "embedding"
        inner = nested
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[weight if kind == "weight" else kind] = np.ascontiguousarray(from_pytorch(name, value))
    return nested
