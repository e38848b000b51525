"""A checkpoint folder's tensors in one file, under the names of the original code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.diffusion.loading import architectures
from sdtpu_worker.diffusion.loading.original_names import (
    Original,
    original_clip_names,
    original_openclip_names,
    original_unet_names,
    original_vae_names,
)

_LAYOUTS: dict[str, dict[str, tuple[str, Any]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", original_clip_names)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", original_openclip_names)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", original_clip_names),
        "text_encoder_2": ("conditioner.embedders.1.model.", original_openclip_names),
    },
}


def to_single_file(folder: Path, file: Path, architecture: str, dtype: Any = None, **more: np.ndarray) -> None:
    """Write a checkpoint's tensors to one file.

    Args:
        folder: in the diffusers layout.
        file: to write.
        architecture: `sd1`, `sd2` or `sdxl`; decides how text encoders are named.
        dtype: of the file.
        **more: further tensors; two underscores stand for a dot.
    """
    tensors: dict[str, np.ndarray] = {}
    parts = {
        "unet": ("model.diffusion_model.", original_unet_names),
        "vae": ("first_stage_model.", original_vae_names),
        **_LAYOUTS[architecture],
    }
    for part, (prefix, rule) in parts.items():
        (path,) = (folder / part).glob("*.safetensors")
        values = load_file(path)
        tensors |= {prefix + name: value for name, value in _renamed(values, rule(values)).items()}
    tensors |= {name.replace("__", "."): value for name, value in more.items()}
    if dtype is not None:
        tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)


def _renamed(values: dict[str, np.ndarray], originals: dict[str, Original]) -> dict[str, np.ndarray]:
    thirds: dict[str, dict[int, np.ndarray]] = {}
    found: dict[str, np.ndarray] = {}
    for name, original in originals.items():
        value = values[name].T if original.transposed else values[name]
        if ".mid.attn_1." in original.name and value.ndim == 2:
            value = value[:, :, None, None]  # the original attention of a VAE is of 1×1 convolutions
        if original.third is None:
            found[original.name] = value
        else:
            thirds.setdefault(original.name, {})[original.third] = value
    return found | {name: np.concatenate([of[0], of[1], of[2]]) for name, of in thirds.items()}


def make_tiny(monkeypatch: pytest.MonkeyPatch, architecture: str, configs: dict[str, dict[str, Any]]) -> None:
    """Give an architecture the configs of a tiny checkpoint.

    Args:
        monkeypatch: undoes it.
        architecture: which.
        configs: by part.
    """
    monkeypatch.setitem(architectures.UNETS, architecture, configs["unet"])
    monkeypatch.setitem(architectures.VAES, architecture, configs["vae"])
    texts = {part: configs[part] for part in architectures.TEXT_ENCODERS[architecture]}
    monkeypatch.setitem(architectures.TEXT_ENCODERS, architecture, texts)
