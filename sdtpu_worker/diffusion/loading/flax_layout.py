"""Flax's parameters as PyTorch has them: one rule for names, one for layouts.

diffusers and transformers wrote Flax weights until 0.39 and 4.57: nested as msgpack, or as safetensors under names
with dots. Their modules are nested as PyTorch's are, so a name differs in its last part and in members of lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore

from sdtpu_worker.diffusion.loading.safetensors_file import broken_file
from sdtpu_worker.diffusion.loading.tensors import StoredTensor
from sdtpu_worker.errors import InvalidCheckpoint

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Members of an `nn.ModuleList` or `nn.Sequential`: `resnets.0` in PyTorch, one module `resnets_0` in Flax. Other
# modules end in a number too (`linear_1`), so the lists are named.
_LISTS = (
    "down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "net",
    "to_out", "controlnet_down_blocks", "blocks",
)  # fmt: skip
_LIST_MEMBER = re.compile(rf"\b({'|'.join(_LISTS)})_(\d+)(?=\.)")


def pytorch_name(flax_name: str) -> str:
    """Return PyTorch's name of a parameter: `a_0.b.kernel` is `a.0.b.weight` if `a` is a list."""
    modules, dot, leaf = flax_name.rpartition(".")
    return _LIST_MEMBER.sub(r"\1.\2", modules + dot) + _LEAVES.get(leaf, leaf)


def to_pytorch(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return Flax's tensors, named `a.b.c`, under PyTorch's names and in PyTorch's layout."""
    return {
        pytorch_name(name): _turn(tensor) if name.endswith(".kernel") or name == "kernel" else tensor
        for name, tensor in tensors.items()
    }


def _turn(tensor: StoredTensor) -> StoredTensor:
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(tensor.shape))
    if axes is None:
        return tensor
    return tensor.changed(tuple(tensor.shape[axis] for axis in axes), lambda array: array.transpose(axes))


def open_msgpack(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a msgpack file, under PyTorch's names and in PyTorch's layout.

    The whole file is read into memory: msgpack cannot be mapped.

    Raises:
        InvalidCheckpoint: the file is not msgpack of arrays.
    """
    try:
        params = msgpack_restore(path.read_bytes())
        leaves = dict(_flatten(params, "")) if isinstance(params, Mapping) else None
    except Exception as exc:  # msgpack raises a different error for each way in which a file can be broken
        raise broken_file(path, exc) from exc
    if leaves is None:
        raise InvalidCheckpoint(f"{path} holds no parameters, but {type(params).__name__}; download it again")
    return to_pytorch(leaves)


def _flatten(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the leaves under names with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            array = np.asarray(value)
            yield f"{prefix}{key}", StoredTensor(array.shape, array.dtype, array.view)
