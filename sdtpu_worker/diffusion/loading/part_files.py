"""Find and open the weights of one part of a folder in diffusers' layout: `unet/`, `vae/`, `text_encoder/` …"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sdtpu_worker.diffusion.loading.flax_layout import open_msgpack, to_pytorch
from sdtpu_worker.diffusion.loading.safetensors_file import REMEDY, broken_file, open_safetensors
from sdtpu_worker.diffusion.loading.tensors import StoredTensor, TensorSource, some
from sdtpu_worker.errors import InvalidCheckpoint

WHOLE_FOLDER = ""
"""The part of a model that has a folder of its own, such as a ControlNet."""
_DIFFUSERS_PARTS = ("unet", "vae", WHOLE_FOLDER)  # the others are transformers' models
# Variants from the preferred to the last: the plain file, then fewer bits, then whatever there is, and last weights
# that are there to be trained further: `non_ema` stands beside the averaged weights that are meant to be sampled.
_PREFERRED, _LAST = ("", "fp16", "bf16", "fp32"), ("non_ema", "non-ema")


def weight_file_names(part: str) -> list[str]:
    """Return the usual names of the files that may hold a part's weights, the preferred first."""
    stem, flax_stem = _stems(part)
    return [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{flax_stem}.msgpack",
    ]


def find_weights(folder: Path, part: str) -> Path | None:
    """Return the preferred file with a part's weights, or the index of several files, or None.

    Safetensors come before msgpack, the plain ones before `fp16`, `bf16` and others, a whole file before an index.

    Args:
        folder: of the checkpoint.
        part: the folder in it, like `unet` or `text_encoder_2`.
    """
    stem, flax_stem = _stems(part)
    pattern = re.compile(
        rf"{stem}(?:\.(?P<variant>[\w-]+))?\.safetensors(?:\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
    )
    found = []
    for path in sorted((folder / part).glob(f"{stem}*")):
        match = pattern.fullmatch(path.name)
        if match and path.is_file() and "-of-" not in path.name:
            variant = match["index_variant"] or match["variant"] or ""
            found.append((_rank(variant), path.suffix == ".json", path))
    if found:
        return min(found)[-1]
    flax = folder / part / f"{flax_stem}.msgpack"
    return flax if flax.is_file() else None


def has_weights(folder: Path, part: str) -> bool:
    """Return whether a part's weights are there, with every file that an index names.

    Raises:
        InvalidCheckpoint: the index is broken.
    """
    path = find_weights(folder, part)
    if path is None or path.suffix != ".json":
        return path is not None
    return all((path.parent / name).is_file() for name in set(_read_index(path).values()))


def open_part(folder: Path, part: str) -> TensorSource:
    """Open the weights of one part; only headers are read (msgpack is read whole).

    Args:
        folder: of the checkpoint.
        part: the folder in it, like `unet` or `text_encoder_2`.

    Raises:
        InvalidCheckpoint: the part has no weights of an allowed format, or they are broken.
    """
    path = find_weights(folder, part)
    if path is None:
        raise InvalidCheckpoint(_describe_missing(folder, part))
    return open_weights(path)


def open_weights(path: Path) -> TensorSource:
    """Open a file of one model's weights: safetensors, an index of several (`.json`), or Flax's msgpack.

    Raises:
        InvalidCheckpoint: the file is of another format, or broken, or holds nothing.
    """
    if path.suffix == ".msgpack":
        tensors = open_msgpack(path)
    elif path.suffix == ".json":
        tensors = _open_shards(path)
    elif path.suffix == ".safetensors":
        tensors, metadata = open_safetensors(path)
        tensors = to_pytorch(tensors) if metadata.get("format") == "flax" else tensors
    else:
        raise InvalidCheckpoint(
            f"{path} is not .safetensors; .bin, .ckpt, .pt and .pth files are pickles, which can run code when they"
            f" are opened, and are never read; {REMEDY}"
        )
    if not tensors:
        raise InvalidCheckpoint(f"{path} holds no parameters; download or convert it again")
    return TensorSource(str(path), tensors)


def _stems(part: str) -> tuple[str, str]:
    if part in _DIFFUSERS_PARTS:
        return "diffusion_pytorch_model", "diffusion_flax_model"
    return "model", "flax_model"


def _rank(variant: str) -> tuple[int, str]:
    order = (*_PREFERRED, None, *_LAST)
    return order.index(variant if variant in order else None), variant


def _read_index(index: Path) -> dict[str, str]:
    """Return by tensor the file that an index names for it."""
    try:
        file_of = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise broken_file(index, exc) from exc
    names = sorted(set(file_of.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise InvalidCheckpoint(f"{index} may only name .safetensors files beside it, got {some(outside)}")
    return file_of


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    """Open the files that an index names; each must hold what the index says of it."""
    file_of = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    formats = set()
    for file in sorted(set(file_of.values())):
        opened, metadata = open_safetensors(index.parent / file)
        formats.add(metadata.get("format"))
        if twice := [name for name in opened if name in tensors]:
            raise InvalidCheckpoint(f"{index}: several of its files hold {some(twice)}; download it again")
        tensors.update(opened)
    if absent := [name for name in file_of if name not in tensors]:
        raise InvalidCheckpoint(f"{index} names tensors that its files lack: {some(absent)}; download it again")
    return to_pytorch(tensors) if formats == {"flax"} else tensors


def _describe_missing(folder: Path, part: str) -> str:
    names = (path.name for path in (folder / part).glob("*") if path.is_file() and path.suffix not in (".json", ".txt"))
    return (
        f"{folder}: {part} has no weights that this worker reads (found {', '.join(sorted(names)) or 'no weights'});"
        f" it reads {', '.join(weight_file_names(part))}, and never .bin, .ckpt, .pt or .pth files: these are pickles,"
        f" which can run code when they are opened; {REMEDY}"
    )
