"""A checkpoint's safetensors written anew: as a variant, in several files, in another type, under older names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")


def rewrite(
    folder: Path,
    *,
    variant: str = "",
    old_attention: bool = False,
    shards: int = 1,
    dtype: Any = None,
    without_prefix: bool = False,
) -> None:
    """Rewrite every part of a checkpoint.

    Args:
        folder: with one safetensors file in each part.
        variant: a word in the files' names.
        old_attention: the VAE's attention under the names, and as the convolutions, of before 2023.
        shards: files of each part.
        dtype: of the tensors.
        without_prefix: text encoders as transformers 5 writes them.
    """
    for part in PARTS:
        for path in (folder / part).glob("*.safetensors"):
            tensors = load_file(path)
            path.unlink()
            if dtype is not None:
                tensors = {name: value.astype(dtype) for name, value in tensors.items()}
            if old_attention and part == "vae":
                tensors = dict(_with_old_attention(name, value) for name, value in tensors.items())
            if part.startswith("text_encoder"):
                if without_prefix:
                    tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
                else:
                    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
            stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
            _write(folder / part, stem, variant, shards, tensors)


def _with_old_attention(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    for new, old in _OLD_ATTENTION.items():
        if f".{new}." in name:
            is_weight = name.endswith(".weight")
            return name.replace(f".{new}.", f".{old}."), value[:, :, None, None] if is_weight else value
    return name, value


def _write(folder: Path, stem: str, variant: str, shards: int, tensors: dict[str, np.ndarray]) -> None:
    dot = f".{variant}" if variant else ""
    if shards == 1:
        save_file(tensors, folder / f"{stem}{dot}.safetensors", {"format": "pt"})
        return
    names = [f"{stem}{dot}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    chosen = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: value for name, value in tensors.items() if chosen[name] == file}, folder / file)
    (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps({"weight_map": chosen}))
