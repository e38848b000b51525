"""Flax parameters as PyTorch has them: the inverse of what the worker does, written from PyTorch's side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.checkpoint import load_checkpoint

# Modules that are members of an `nn.ModuleList` or `nn.Sequential` in PyTorch, and one module in Flax.
_LISTS = ("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers",
          "net", "to_out")  # fmt: skip
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_pytorch(params: Mapping[str, Any], old_attention: bool = False) -> dict[str, np.ndarray]:
    """Return the tensors under PyTorch's names and in PyTorch's layout."""
    return {name: np.ascontiguousarray(value) for name, value in _walk(params, "", old_attention)}


def _walk(params: Mapping[str, Any], prefix: str, old_attention: bool) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            list_name, _, number = name.rpartition("_")
            module = f"{list_name}.{number}" if list_name in _LISTS else name
            module = module if old_attention else _RENAMED.get(module, module)
            yield from _walk(value, f"{prefix}{module}.", old_attention)
        elif name == "kernel" and value.ndim == 4:
            yield f"{prefix}weight", np.einsum("hwio->oihw", value)
        elif name == "kernel":
            yield f"{prefix}weight", np.einsum("io->oi", value)
        else:
            yield prefix + ("weight" if name in ("scale", "embedding") else name), value


def rewrite_as_pytorch(
    folder: Path,
    params: Mapping[str, Any] | None = None,
    *,
    variant: str = "",
    old_attention: bool = False,
    shards: int = 1,
    dtype: Any = None,
) -> None:
    """Replace a checkpoint's weights by safetensors in PyTorch's layout."""
    for part, tree in (params or load_checkpoint(str(folder)).params).items():
        for path in (folder / part).glob("*.msgpack"):
            path.unlink()
        tensors = to_pytorch(tree, old_attention)
        if dtype is not None:
            tensors = {name: value.astype(dtype) for name, value in tensors.items()}
        if part == "text_encoder":
            tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        if shards == 1:
            name = ".".join(filter(None, (stem, variant, "safetensors")))
            save_file(tensors, folder / part / name, {"format": "pt"})
            continue
        names = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        chosen = {name: names[i % shards] for i, name in enumerate(tensors)}
        for file in names:
            save_file({name: value for name, value in tensors.items() if chosen[name] == file}, folder / part / file)
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": chosen}))
