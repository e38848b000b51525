"""Read the weights of one part of a checkpoint: Flax msgpack, or safetensors in the layout of Flax or of PyTorch.

Pickles (`.bin`, `.ckpt`, `.pt`, `.pth`) can run code when they are opened, so this module opens none. It converts
without PyTorch: the name and the shape of every Flax leaf say under which name and in which layout PyTorch has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from sdtpu_worker.errors import InvalidCheckpoint

Params = dict[str, Any]
Tensors = dict[str, np.ndarray]

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_FLAX_STEMS = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # of protocols 2 to 5, and of torch.save's zip
_PYTORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BUFFERS = ("position_ids",)  # PyTorch stores these constants, Flax computes them
_REMEDY = (
    "convert it where it is trusted: load it with diffusers' `from_pretrained` and write it with"
    " `save_pretrained(safe_serialization=True)`"
)


def weight_file_names(part: str) -> list[str]:
    """Return the names of the files that may hold a part's weights, the preferred first.

    Those that end in `.json` are indexes of weights in several files.
    """
    stem = _STEMS.get(part, "model")
    return [
        f"{_FLAX_STEMS.get(part, 'flax_model')}.msgpack",
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
    ]


def find_weights(folder: Path, part: str) -> Path | None:
    """Return the preferred file with a part's weights, or None."""
    candidates = (folder / part / name for name in weight_file_names(part))
    return next((path for path in candidates if path.is_file()), None)


def read_weights(folder: Path, part: str, shapes: Mapping[str, Any], dtype: Any) -> Params:
    """Return a part's parameters as host arrays.

    Args:
        folder: of the checkpoint.
        part: `unet`, `vae`, `text_encoder` or `safety_checker`.
        shapes: the tree of the Flax model's parameters; its leaves have a `shape`.
        dtype: of the parameters that are returned.

    Raises:
        InvalidCheckpoint: the part has no weights of an allowed format, or they are broken, or do not fit the shapes.
    """
    path = find_weights(folder, part)
    if path is None:
        raise InvalidCheckpoint(_describe_missing(folder, part))
    expected = {tuple(map(str, leaf)): value.shape for leaf, value in flatten_dict(shapes).items()}
    if path.suffix == ".msgpack":
        found = _read_msgpack(path)
    else:
        tensors, flax_layout = _read_safetensors(path)
        found = _split_names(tensors, expected) if flax_layout else _from_pytorch(tensors, expected)
    _check(path, found, expected)
    return unflatten_dict({leaf: np.asarray(found[leaf], dtype) for leaf in expected})


def _describe_missing(folder: Path, part: str) -> str:
    names = (path.name for path in (folder / part).glob("*") if path.is_file() and path.suffix not in (".json", ".txt"))
    return (
        f"{folder}: {part} has no weights that this worker reads (found {', '.join(sorted(names)) or 'no weights'});"
        f" it reads {', '.join(weight_file_names(part))}, and never .bin, .ckpt, .pt or .pth files: these are pickles,"
        f" which can run code when they are opened; {_REMEDY}"
    )


def _read_msgpack(path: Path) -> dict[tuple[str, ...], Any]:
    try:
        params = msgpack_restore(path.read_bytes())
    except Exception as exc:  # msgpack raises a different error for each way in which a file can be broken
        raise _broken(path, exc) from exc
    if not isinstance(params, dict) or not params:
        raise InvalidCheckpoint(f"{path} holds no parameters")
    return {tuple(map(str, leaf)): value for leaf, value in flatten_dict(params).items()}


def _read_safetensors(path: Path) -> tuple[Tensors, bool]:
    """Return the tensors of a file, or of those that an index names, and whether they are in Flax's layout."""
    tensors: Tensors = {}
    formats = set()
    for file in [path] if path.suffix == ".safetensors" else _shards(path):
        try:
            with safe_open(file, framework="np") as opened:
                formats.add((opened.metadata() or {}).get("format"))
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118  a safe_open has keys() and cannot be iterated
        except Exception as exc:  # the reader's own errors, OS errors, unknown types of numbers
            raise _broken(file, exc) from exc
    if not tensors:
        raise InvalidCheckpoint(f"{path} holds no parameters")
    return tensors, formats == {"flax"}


def _shards(index: Path) -> list[Path]:
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise _broken(index, exc) from exc
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise InvalidCheckpoint(f"{index} may only name .safetensors files beside it, got {_some(outside)}")
    return [index.parent / name for name in sorted(names)]


def _split_names(tensors: Tensors, expected: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """Rename from `a.b.c`, which is how transformers writes Flax parameters as safetensors."""
    leaves = {".".join(leaf): leaf for leaf in expected}
    return {leaves.get(name, (name,)): value for name, value in tensors.items()}


def _from_pytorch(tensors: Tensors, expected: Mapping[tuple[str, ...], tuple[int, ...]]) -> dict[tuple[str, ...], Any]:
    """Rename PyTorch's tensors to Flax's leaves and bring them into Flax's layout; leave unknown names as they are."""
    left = {_with_dots(name): name for name in tensors if not name.endswith(_BUFFERS)}
    found: dict[tuple[str, ...], Any] = {}
    for leaf, shape in expected.items():
        *modules, kind = leaf
        last = modules[-1] if modules else ""
        for module in (last, _NEW_ATTENTION.get(last, last)):
            name = _with_dots(".".join([*modules[:-1], module, _PYTORCH_LEAVES.get(kind, kind)]).lstrip("."))
            if name in left:
                value = tensors[left.pop(name)]
                found[leaf] = _to_flax_layout(value, shape) if kind == "kernel" else value
                break
    return found | {(name,): tensors[name] for name in left.values()}


def _with_dots(name: str) -> str:
    """Write the members of lists in one way: Flax has `blocks_0` for PyTorch's `blocks.0`."""
    return re.sub(r"_(?=\d+(?:\.|$))", ".", name)


def _to_flax_layout(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turn a convolution's OIHW into HWIO and a linear layer's (out, in) into (in, out)."""
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    pointwise = value.shape[-2:] == shape[-2:] and value.size == np.prod(shape)
    return value.reshape(shape) if pointwise else value  # old attentions are convolutions of 1 x 1


def _check(path: Path, found: Mapping[tuple[str, ...], Any], expected: Mapping[tuple[str, ...], Any]) -> None:
    """Compare leaf by leaf.

    Raises:
        InvalidCheckpoint: the text names the leaves that are missing, unexpected, or of another shape or type.
    """
    wrong = [
        f"{'/'.join(leaf)} ({np.shape(found[leaf])}, the config makes it {tuple(shape)})"
        for leaf, shape in expected.items()
        if leaf in found and np.shape(found[leaf]) != tuple(shape)
    ]
    faults = {
        "missing": ["/".join(leaf) for leaf in expected if leaf not in found],
        "unexpected": ["/".join(leaf) for leaf in found if leaf not in expected],
        "of another shape": wrong,
        "not floating point": [
            "/".join(leaf)
            for leaf in expected
            if leaf in found and not jnp.issubdtype(np.asarray(found[leaf]).dtype, jnp.floating)
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{fault}: {_some(leaves)}" for fault, leaves in faults.items() if leaves)
        raise InvalidCheckpoint(
            f"{path}: the parameters do not fit the config beside them ({text}); take both from one checkpoint"
        )


def _broken(path: Path, exc: Exception) -> InvalidCheckpoint:
    """Return the error that says why a file could not be read: often it is a pickle under another name."""
    size, start = "missing", b""
    if path.is_file():
        size = f"{path.stat().st_size:,} bytes"
        with path.open("rb") as file:
            start = file.read(4)
    if _PICKLE_MAGIC.match(start):
        return InvalidCheckpoint(
            f"{path} is a pickle, whatever its name says, and can run code when it is opened; {_REMEDY}"
        )
    return InvalidCheckpoint(
        f"{path} is not a complete weights file ({size}): {type(exc).__name__}: {exc}; download or convert it again"
    )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
