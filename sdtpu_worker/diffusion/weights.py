"""Read the weights of one part of a checkpoint: Flax msgpack, or safetensors in the layout of Flax or of PyTorch.

Pickles (`.bin`, `.ckpt`, `.pt`, `.pth`) can run code when they are opened, so this module opens none. Parameters are
named as in PyTorch, whatever the file is: Flax's names become PyTorch's by a rule.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") known
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch

Tensors = dict[str, np.ndarray]

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_FLAX_STEMS = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
_PICKLE_MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # of protocols 2 to 5, and of torch.save's zip
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_FLAX_LISTS = re.compile(
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)_(\d+)$"
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BUFFERS = ("position_ids",)  # PyTorch stores these constants, the networks compute them
_HARMLESS = ("logit_scale", "text_projection.weight", "text_model.text_projection.weight")
"""What text encoders are saved with that Stable Diffusion does not use."""
_TEXT_PREFIX = "text_model."
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


def read_weights(folder: Path, part: str, shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> Tensors:
    """Return a part's parameters as host arrays, by PyTorch's names, in the layout of `models/layout.py`.

    Args:
        folder: of the checkpoint.
        part: `unet`, `vae`, `text_encoder`, `text_encoder_2` or `safety_checker`.
        shapes: of the network's parameters.
        dtype: of the parameters that are returned.

    Raises:
        InvalidCheckpoint: the part has no weights of an allowed format, or they are broken, or do not fit the shapes.
    """
    path = find_weights(folder, part)
    if path is None:
        raise InvalidCheckpoint(_describe_missing(folder, part))
    if path.suffix == ".msgpack":
        found = {flax_name(leaf): value for leaf, value in _read_msgpack(path).items()}
    else:
        tensors, flax_layout = _read_safetensors(path)
        if flax_layout:
            found = {flax_name(tuple(name.split("."))): value for name, value in tensors.items()}
        else:
            found = {name: from_pytorch(name, value) for name, value in _modern_names(tensors, shapes).items()}
    found = {name: _without_pixels(value, shapes.get(name)) for name, value in found.items()}
    _check(path, found, shapes)
    return {name: np.asarray(found[name], dtype) for name in shapes}


def flax_name(leaf: tuple[str, ...]) -> str:
    """Return PyTorch's name of a parameter that Flax's models nest under these names."""
    *modules, kind = leaf
    names = [_OLD_ATTENTION.get(name, _FLAX_LISTS.sub(r"\1.\2", name)) for name in modules]
    return ".".join([*names, _FLAX_LEAVES.get(kind, kind)])


def _modern_names(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return tensors under the names of today's PyTorch models, without what the networks compute or do not use."""
    with_prefix = any(name.startswith(_TEXT_PREFIX) for name in shapes)
    lacks_prefix = with_prefix and not any(name.startswith(_TEXT_PREFIX) for name in tensors)
    named: Tensors = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if len(parts) > 1 and parts[-2] in _OLD_ATTENTION:
            parts[-2] = _OLD_ATTENTION[parts[-2]]
        new = ".".join(parts)
        if lacks_prefix and new not in shapes:
            new = _TEXT_PREFIX + new
        is_surplus = new.endswith(_BUFFERS) or (with_prefix and name in _HARMLESS and new not in shapes)
        if not is_surplus:
            named[new] = value
    return named


def _without_pixels(value: Any, shape: tuple[int, ...] | None) -> Any:
    """Return a linear weight of what old checkpoints keep as a convolution of 1 x 1, and the reverse."""
    found = np.shape(value)
    if shape is None or {len(found), len(shape)} != {2, 4} or found[-2:] != shape[-2:]:
        return value
    return value.reshape(shape) if np.size(value) == math.prod(shape) else value


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


def _check(path: Path, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare tensor by tensor.

    Raises:
        InvalidCheckpoint: the text names the tensors that are missing, unexpected, of another shape or type, or have a
            value that is not finite.
    """
    both = [name for name in shapes if name in found]
    fitting = [name for name in both if np.shape(found[name]) == tuple(shapes[name])]
    floating = [name for name in both if jnp.issubdtype(np.asarray(found[name]).dtype, jnp.floating)]
    faults = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} ({np.shape(found[name])}, the config makes it {tuple(shapes[name])})"
            for name in both
            if name not in fitting
        ],
        "not floating point": [name for name in both if name not in floating],
        "not finite": [name for name in fitting if name in floating and not _is_finite(found[name])],
    }
    if any(faults.values()):
        text = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise InvalidCheckpoint(
            f"{path}: the parameters do not fit the config beside them ({text}); take both from one checkpoint"
        )


def _is_finite(value: Any) -> bool:
    return bool(np.isfinite(np.asarray(value, np.float32).sum(dtype=np.float64)))


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
