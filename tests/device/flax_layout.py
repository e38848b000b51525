"""A checkpoint of today as Flax's libraries wrote it before 2026: the inverse of what the worker reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file

from sdtpu_worker.models.layout import from_pytorch

_LISTS = r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)\.(\d+)"
_OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def to_flax(tensors: Mapping[str, np.ndarray], old_attention: bool = False) -> dict[str, Any]:
    """Return PyTorch's tensors as nested parameters under Flax's names, in Flax's layout."""
    nested: dict[str, Any] = {}
    for name, value in tensors.items():
        *modules, kind = re.sub(_LISTS, r"\1_\2", name).split(".")
        if old_attention:
            modules = [_OLD_VAE.get(module, module) for module in modules]
        kinds = {"weight": "kernel" if value.ndim > 1 else "scale"}
        if modules and modules[-1].endswith("_embedding") and value.ndim == 2:
            kinds = {"weight": "embedding"}
        inner = nested
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[kinds.get(kind, kind)] = np.ascontiguousarray(from_pytorch(name, value))
    return nested


def rewrite_as_flax(folder: Path) -> None:
    """Replace the safetensors of a checkpoint by msgpack."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker"):
        for path in (folder / part).glob("*.safetensors"):
            stem = "diffusion_flax_model" if part in ("unet", "vae") else "flax_model"
            params = to_flax(load_file(path), old_attention=part == "vae")
            (folder / part / f"{stem}.msgpack").write_bytes(msgpack_serialize(params))
            path.unlink()
