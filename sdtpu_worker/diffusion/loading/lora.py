"""Merge LoRAs into the weights while these are loaded: what is served is then an ordinary checkpoint.

A LoRA changes a weight W by weight · (alpha / rank) · up @ down, in float32. LoCon's `mid` (Tucker) lies between the
two. LoHa, LoKr, DoRA and what is unknown are refused by name: a LoRA that was merged in part would draw something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sdtpu_worker.diffusion.loading.fit import is_float
from sdtpu_worker.diffusion.loading.load import Changes
from sdtpu_worker.diffusion.loading.lora_files import PeftAlphas, find_lora
from sdtpu_worker.diffusion.loading.lora_names import ModuleNames, describe_kind, split_key
from sdtpu_worker.diffusion.loading.recognise import describe_family
from sdtpu_worker.diffusion.loading.safetensors_file import open_safetensors
from sdtpu_worker.diffusion.loading.tensors import Shape, Shapes, StoredTensor, some
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch, pytorch_shape


@dataclass(frozen=True)
class MergedLora:
    """What was merged, for logs and results.

    Attributes:
        name: as the setting has it.
        weight: by which the LoRA counts.
        count: how many tensors of the checkpoint it changed.
    """

    name: str
    weight: float
    count: int


@dataclass(frozen=True)
class LoraMerge:
    """What merging is.

    Attributes:
        changes: by part, to be given to `iterate_weights`.
        merged: what they come from, in the given order.
    """

    changes: Mapping[str, Changes]
    merged: tuple[MergedLora, ...]


@dataclass(frozen=True)
class LoraLayer:
    """One module of a LoRA.

    Attributes:
        label: the file and the module; errors begin with it.
        down, up, mid: its matrices as stored.
        scale: alpha / rank.
    """

    label: str
    down: StoredTensor
    up: StoredTensor
    mid: StoredTensor | None
    scale: float


def merge_loras(loras: Sequence[tuple[str, float]], shapes: Mapping[str, Shapes]) -> LoraMerge:
    """Open LoRAs and return the changes that merge them, in the given order.

    Only headers and alphas are read; a change reads its layer when it is applied.

    Args:
        loras: names with their weights; see `find_lora`.
        shapes: by part (`unet`, `text_encoder`, `text_encoder_2`), those of `iterate_weights`.

    Raises:
        InvalidCheckpoint: a file is missing or broken, has keys that are no LoRA's, or does not fit the model; or a
            weight is not a finite number.
    """
    names = ModuleNames(shapes)
    changes: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {part: {} for part in shapes}
    merged = []
    for name, weight in loras:
        if not math.isfinite(weight):
            raise InvalidCheckpoint(f"sdtpu_loras_merged: the weight of {name!r} must be a finite number, got {weight}")
        layers = read_layers(find_lora(name), names, shapes)
        for (part, parameter), layer in layers.items():
            before = changes[part].get(parameter)
            changes[part][parameter] = partial(_add, layer=layer, weight=weight, name=parameter, before=before)
        merged.append(MergedLora(name, weight, len(layers)))
    return LoraMerge(changes, tuple(merged))


def read_layers(path: Path, names: ModuleNames, shapes: Mapping[str, Shapes]) -> dict[tuple[str, str], LoraLayer]:
    """Return the layers of a file by part and parameter; every key belongs to one, or the file is refused.

    Only the header and the alphas are read.

    Args:
        path: the file.
        names: of the model's modules.
        shapes: by part, those of the model's parameters.

    Raises:
        InvalidCheckpoint: the file is broken, has keys that are no LoRA's, or does not fit the model.
    """
    tensors, metadata = open_safetensors(path)
    modules = _group(path, tensors)
    targets = _targets(path, modules, names, shapes)
    alphas = PeftAlphas(path, metadata)
    layers: dict[tuple[str, str], LoraLayer] = {}
    for module, target in targets.items():
        if target in layers:
            raise InvalidCheckpoint(
                f"{path} has several layers for {target[1]} of {target[0]}, one of them {module}; take a file with one"
            )
        of = modules[module]
        _check_shapes(path, module, of, pytorch_shape(target[1], shapes[target[0]][target[1]]))
        scale = _scale(path, module, of, alphas)
        layers[target] = LoraLayer(f"{path}: {module}", of["down"], of["up"], of.get("mid"), scale)
    return layers


def _group(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Return the tensors by module and role.

    Raises:
        InvalidCheckpoint: a key is of a kind that is not merged, or one of two matrices is missing.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None or split[1] in modules.get(split[0], {}):
            strange.append(f"{key} ({describe_kind(key)})")
        elif split[1] != "alpha" and not is_float(tensor.dtype):
            strange.append(f"{key} ({tensor.dtype})")
        else:
            modules.setdefault(split[0], {})[split[1]] = tensor
    strange += [f"{module} (no pair of down and up)" for module, of in modules.items() if not {"down", "up"} <= set(of)]
    if strange or not modules:
        raise InvalidCheckpoint(
            f"{path} is no LoRA that can be merged: {some(strange) or 'it is empty'}; LoRA and LoCon are, in the"
            " layouts of kohya, diffusers and PEFT"
        )
    return modules


def _targets(
    path: Path, modules: Mapping[str, object], names: ModuleNames, shapes: Mapping[str, Shapes]
) -> dict[str, tuple[str, str]]:
    """Return by module the part and the parameter.

    Raises:
        InvalidCheckpoint: the model has no such parameter.
    """
    found = {module: names.find(module) for module in modules}
    if unknown := [module for module, target in found.items() if target is None]:
        stored = {name: pytorch_shape(name, shape) for name, shape in shapes.get("unet", {}).items()}
        raise InvalidCheckpoint(
            f"{path} does not fit the model, which has no {some(unknown)}; the model's UNet is that of"
            f" {describe_family(stored)}: is the LoRA for another one?"
        )
    return {module: target for module, target in found.items() if target}


def _check_shapes(path: Path, module: str, of: Mapping[str, StoredTensor], wanted: Shape) -> None:
    down, up = of["down"].shape, of["up"].shape
    fits = len(down) >= 2 and len(up) >= 2 and down[0] == up[1] > 0 and math.prod(up[2:]) == 1 and up[0] == wanted[0]
    if "mid" in of:
        mid = of["mid"].shape
        fits = fits and len(mid) == 4 and mid[:2] == (down[0], down[0]) and mid[2:] == wanted[2:]
        fits = fits and math.prod(down[2:]) == 1 and down[1] == wanted[1]
    else:
        # A linear layer and the same as a 1×1 convolution differ by ones.
        fits = fits and down[1] == wanted[1] and (*down[2:], 1, 1)[:2] == (*wanted[2:], 1, 1)[:2]
    if not fits or len(wanted) not in (2, 4) or len(down) not in (2, 4):
        shapes = ", ".join(f"{role} {tensor.shape}" for role, tensor in of.items())
        raise InvalidCheckpoint(
            f"{path}: {module} ({shapes}) does not fit the model's weight {wanted}; it was made for another kind of"
            " checkpoint"
        )


def _scale(path: Path, module: str, of: Mapping[str, StoredTensor], alphas: PeftAlphas) -> float:
    """Return alpha / rank; without an alpha it is 1."""
    rank = of["down"].shape[0]
    if "alpha" not in of:
        return alphas.scale(module, rank)
    if math.prod(of["alpha"].shape) != 1:
        raise InvalidCheckpoint(
            f"{path}: the alpha of {module} must be one number, got the shape {of['alpha'].shape}; take another file"
        )
    return float(of["alpha"].read().reshape(())) / rank


def _add(
    array: np.ndarray, *, layer: LoraLayer, weight: float, name: str, before: Callable[[np.ndarray], np.ndarray] | None
) -> np.ndarray:
    """Return a weight (float32, our layout) with one more LoRA in it.

    Raises:
        InvalidCheckpoint: the LoRA's numbers are not finite.
    """
    if before is not None:
        array = before(array)
    down, up = (tensor.read().astype(np.float32) for tensor in (layer.down, layer.up))
    rank = down.shape[0]
    up = up.reshape(up.shape[0], rank)
    if layer.mid is not None:
        mid = layer.mid.read().astype(np.float32)
        delta = np.einsum("oa,abhw,bi->oihw", up, mid, down.reshape(rank, -1), optimize=True)
    else:
        delta = up @ down.reshape(rank, -1)
    delta = np.float32(layer.scale * weight) * delta.reshape(pytorch_shape(name, array.shape))
    if not np.isfinite(delta).all():
        raise InvalidCheckpoint(
            f"{layer.label} has values that are not finite (NaN or infinity); the LoRA was broken when it was made:"
            " take another"
        )
    return array + from_pytorch(name, delta)
