"""Read the weights of one part of a checkpoint: Flax msgpack, or safetensors in the layout of Flax or of PyTorch.

Pickles (`.bin`, `.ckpt`, `.pt`, `.pth`) can run code when they are opened, so this module opens none. Parameters are
named as in PyTorch, whatever the file is: Flax's names become PyTorch's by a rule.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from sdtpu_worker.diffusion.recognise import describe_family
from sdtpu_worker.diffusion.stored_tensors import StoredTensor, open_safetensors
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import axes_from_pytorch

Tensors = Mapping[str, StoredTensor]
Deltas = Mapping[str, Callable[[], np.ndarray]]
"""By name, what computes a float32 array to add to a parameter, in this package's layout."""

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_FLAX_STEMS = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # of protocols 2 to 5, and of torch.save's zip
_LFS_POINTER = b"version https://git-lfs"
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_FLAX_LISTS = re.compile(
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)_(\d+)$"
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BUFFERS = ("position_ids",)  # PyTorch stores these constants, the networks compute them
_HARMLESS = ("logit_scale", "text_projection.weight", "text_model.text_projection.weight")
"""What text encoders are saved with that Stable Diffusion does not use."""
_PREFIXES = ("text_model.", "vision_model.")
"""Of CLIP's encoders, which transformers 5 leaves out."""
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


def read_weights(
    folder: Path, part: str, shapes: Mapping[str, tuple[int, ...]], dtype: Any, deltas: Deltas | None = None
) -> dict[str, np.ndarray]:
    """Return a part's parameters as host arrays, by PyTorch's names, in the layout of `models/layout.py`.

    One tensor after the other is read and cast, so that the memory of one is all that is needed beside the result.

    Args:
        folder: of the checkpoint.
        part: `unet`, `vae`, `text_encoder`, `text_encoder_2` or `safety_checker`.
        shapes: of the network's parameters.
        dtype: of the parameters that are returned.
        deltas: by name, what is added to a parameter before it is cast.

    Raises:
        InvalidCheckpoint: the part has no weights of an allowed format, or they are broken, or do not fit the shapes.
    """
    path = find_weights(folder, part)
    if path is None:
        raise InvalidCheckpoint(_describe_missing(folder, part))
    if path.suffix == ".msgpack":
        found = {flax_name(leaf): value for leaf, value in _read_msgpack(path).items()}
        return _fit(path, found, shapes, dtype, deltas)
    tensors, flax_layout = _open_all(path)
    if flax_layout:
        found = {flax_name(tuple(name.split("."))): tensor for name, tensor in tensors.items()}
        return _fit(path, found, shapes, dtype, deltas)
    return fit(path, tensors, shapes, dtype, deltas)


def fit(
    path: Path,
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    deltas: Deltas | None = None,
) -> dict[str, np.ndarray]:
    """Return parameters of tensors in PyTorch's layout, under the names of any release of its libraries.

    Args:
        path: the file, for errors.
        tensors: by name.
        shapes: of the network's parameters.
        dtype: of the parameters that are returned.
        deltas: by name, what is added to a parameter before it is cast.

    Raises:
        InvalidCheckpoint: the tensors do not fit the shapes.
    """
    found = {name: _in_our_layout(name, tensor) for name, tensor in _modern_names(tensors, shapes).items()}
    looks_like = describe_family({name: tensor.shape for name, tensor in tensors.items()})
    return _fit(path, found, shapes, dtype, deltas, looks_like)


def _fit(
    path: Path,
    found: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    deltas: Deltas | None,
    looks_like: str = "",
) -> dict[str, np.ndarray]:
    found = {name: _without_pixels(tensor, shapes.get(name)) for name, tensor in found.items()}
    _check(path, found, shapes, looks_like)
    return _cast_all(path, found, shapes, dtype, deltas or {})


def _cast_all(path: Path, found: Tensors, shapes: Iterable[str], dtype: Any, deltas: Deltas) -> dict[str, np.ndarray]:
    """Read the tensors, in the order of the names.

    Raises:
        InvalidCheckpoint: a value is not finite, or a file cannot be read any more.
    """
    arrays, bad = {}, []
    for name in shapes:
        try:
            array = found[name].read()
        except (OSError, ValueError) as exc:
            raise broken(path, exc) from exc
        if name in deltas:
            array = array.astype(np.float32) + deltas[name]()
        arrays[name] = np.ascontiguousarray(array.astype(dtype, copy=False))
        if not np.isfinite(array.astype(np.float32, copy=False).sum(dtype=np.float64)):
            bad.append(name)
    if bad:
        raise InvalidCheckpoint(
            f"{path}: the parameters have values that are not finite (NaN or infinity) in {some(bad)}; download or"
            " convert it again"
        )
    return arrays


def flax_name(leaf: tuple[str, ...]) -> str:
    """Return PyTorch's name of a parameter that Flax's models nest under these names."""
    *modules, kind = leaf
    names = [_OLD_ATTENTION.get(name, _FLAX_LISTS.sub(r"\1.\2", name)) for name in modules]
    return ".".join([*names, _FLAX_LEAVES.get(kind, kind)])


def _modern_names(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Return tensors under the names of the networks, without what these compute or do not use."""
    is_text = any(name.startswith("text_model.") for name in shapes)
    named: dict[str, StoredTensor] = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if len(parts) > 1 and parts[-2] in _OLD_ATTENTION:
            parts[-2] = _OLD_ATTENTION[parts[-2]]
        new = ".".join(parts)
        if new not in shapes:
            new = next((prefix + new for prefix in _PREFIXES if prefix + new in shapes), new)
        is_surplus = new.endswith(_BUFFERS) or (is_text and name in _HARMLESS and new not in shapes)
        if not is_surplus:
            named[new] = value
    return named


def _in_our_layout(name: str, tensor: StoredTensor) -> StoredTensor:
    axes = axes_from_pytorch(name, len(tensor.shape))
    return tensor if axes is None else tensor.transposed(*axes)


def _without_pixels(tensor: StoredTensor, shape: tuple[int, ...] | None) -> StoredTensor:
    """Return a linear weight of what old checkpoints keep as a convolution of 1 x 1, and the reverse."""
    found = tensor.shape
    if shape is None or {len(found), len(shape)} != {2, 4} or found[-2:] != shape[-2:]:
        return tensor
    return tensor.reshaped(tuple(shape)) if math.prod(found) == math.prod(shape) else tensor


def _describe_missing(folder: Path, part: str) -> str:
    names = (path.name for path in (folder / part).glob("*") if path.is_file() and path.suffix not in (".json", ".txt"))
    return (
        f"{folder}: {part} has no weights that this worker reads (found {', '.join(sorted(names)) or 'no weights'});"
        f" it reads {', '.join(weight_file_names(part))}, and never .bin, .ckpt, .pt or .pth files: these are pickles,"
        f" which can run code when they are opened; {_REMEDY}"
    )


def _read_msgpack(path: Path) -> dict[tuple[str, ...], StoredTensor]:
    try:
        params = msgpack_restore(path.read_bytes())
    except Exception as exc:  # msgpack raises a different error for each way in which a file can be broken
        raise broken(path, exc) from exc
    if not isinstance(params, dict) or not params:
        raise InvalidCheckpoint(f"{path} holds no parameters")
    leaves = flatten_dict(params).items()
    return {tuple(map(str, leaf)): StoredTensor.of(np.asarray(value)) for leaf, value in leaves}


def _open_all(path: Path) -> tuple[Tensors, bool]:
    """Return the tensors of a file, or of those that an index names, and whether they are in Flax's layout."""
    tensors: dict[str, StoredTensor] = {}
    formats = set()
    for file in [path] if path.suffix == ".safetensors" else _shards(path):
        try:
            more, metadata = open_safetensors(file)
        except (OSError, ValueError) as exc:
            raise broken(file, exc) from exc
        formats.add(metadata.get("format"))
        tensors.update(more)
    if not tensors:
        raise InvalidCheckpoint(f"{path} holds no parameters")
    return tensors, formats == {"flax"}


def _shards(index: Path) -> list[Path]:
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise broken(index, exc) from exc
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise InvalidCheckpoint(f"{index} may only name .safetensors files beside it, got {some(outside)}")
    return [index.parent / name for name in sorted(names)]


def _check(path: Path, found: Tensors, shapes: Mapping[str, tuple[int, ...]], looks_like: str) -> None:
    """Compare tensor by tensor.

    Raises:
        InvalidCheckpoint: the text names the tensors that are missing, unexpected, or of another shape or type.
    """
    both = [name for name in shapes if name in found]
    faults = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} ({found[name].shape}, the config makes it {tuple(shapes[name])})"
            for name in both
            if found[name].shape != tuple(shapes[name])
        ],
        "not floating point": [name for name in both if not jnp.issubdtype(found[name].dtype, jnp.floating)],
    }
    if any(faults.values()):
        text = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
        looks_like = f"; the file looks like {looks_like}" if looks_like else ""
        raise InvalidCheckpoint(
            f"{path}: the parameters do not fit the config beside them ({text}){looks_like}; take both from one"
            " checkpoint"
        )


def broken(path: Path, exc: Exception) -> InvalidCheckpoint:
    """Return the error that says why a file could not be read: often it is a pickle under another name."""
    size, start = "missing", b""
    if path.is_file():
        size = f"{path.stat().st_size:,} bytes"
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return InvalidCheckpoint(
            f"{path} is a pointer of Git LFS, not the weights themselves; fetch them (`git lfs pull`)"
        )
    if _PICKLE_MAGIC.match(start):
        return InvalidCheckpoint(
            f"{path} is a pickle, whatever its name says, and can run code when it is opened; {_REMEDY}"
        )
    return InvalidCheckpoint(
        f"{path} is not a complete weights file ({size}): {type(exc).__name__}: {exc}; download or convert it again"
    )


def some(names: list[str], limit: int = 5) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
