"""LoRAs that are merged into a checkpoint's parameters when it is loaded.

A LoRA is a product of two small matrices for some of the weights. Files name them in several ways; each is brought to
the tensor's own name, and what is left over is an error: a LoRA that was merged in part would draw something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sdtpu_worker.diffusion.original_names import unet_names
from sdtpu_worker.diffusion.stored_tensors import StoredTensor, open_safetensors
from sdtpu_worker.diffusion.weights import broken, some
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch

_KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
_DOTTED = {"unet.": "unet", "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder"}
_ROLES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_A.default.weight": "down", "lora_B.default.weight": "up", "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up", "lora_linear_layer.alpha": "alpha", "lora.alpha": "alpha",
}  # fmt: skip
_OF_PROCESSOR = re.compile(r"^(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
    "diff": "a full difference", "on_input": "IA3", "w_norm": "a norm", "b_norm": "a norm",
}  # fmt: skip


@dataclass
class _Pair:
    """The tensors of one LoRA for one weight, by role, and how the file names them."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MergedLora:
    """What was merged.

    Attributes:
        name: as the setting has it.
        weight: by which the LoRA counts.
        count: how many tensors of the checkpoint it changed.
    """

    name: str
    weight: float
    count: int


class Loras:
    """The LoRAs of a checkpoint.

    Args:
        wanted: `(file, weight)` of each.

    Raises:
        InvalidCheckpoint: a file is broken, or has keys of a kind that is not merged.
    """

    def __init__(self, wanted: Sequence[tuple[str, float]]) -> None:
        self._loras = [_Lora(name, weight) for name, weight in wanted]

    def deltas(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Callable[[], np.ndarray]]:
        """Return by tensor name what computes the sum of all LoRAs' changes to it, in this package's layout.

        Args:
            part: of the checkpoint.
            shapes: of the part's parameters.
        """
        by_name: dict[str, list[Callable[[], np.ndarray]]] = {}
        for lora in self._loras:
            for name, delta in lora.deltas(part, shapes).items():
                by_name.setdefault(name, []).append(delta)
        return {name: partial(_total, deltas) for name, deltas in by_name.items()}

    def check_all_used(self) -> None:
        """Make sure that every tensor of every file was merged.

        Raises:
            InvalidCheckpoint: the text names the file and those that were not.
        """
        for lora in self._loras:
            lora.check_all_used()

    @property
    def merged(self) -> tuple[MergedLora, ...]:
        """What was merged, in the order of the setting."""
        return tuple(MergedLora(lora.name, lora.weight, len(lora.used)) for lora in self._loras)


class _Lora:
    """One file."""

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.used: set[tuple[str, str]] = set()
        path = Path(name).expanduser()
        try:
            tensors, _ = open_safetensors(path)
        except (OSError, ValueError) as exc:
            raise broken(path, exc) from exc
        self._pairs = _group(name, tensors)

    def deltas(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Callable[[], np.ndarray]]:
        names = _targets(part, shapes)
        found: dict[str, Callable[[], np.ndarray]] = {}
        for module, pair in self._pairs.items():
            target = names.get(module)
            if target is None or module in (used for _, used in self.used):
                continue
            self.used.add((part, module))
            found[target] = partial(self._delta, pair, target, shapes[target])
        return found

    def check_all_used(self) -> None:
        used = {module for _, module in self.used}
        if left := [key for module, pair in self._pairs.items() if module not in used for key in pair.keys]:
            raise InvalidCheckpoint(
                f"the LoRA {self.name} has tensors for weights that this checkpoint has not: {some(left)}; it was made"
                " for another kind of checkpoint"
            )

    def _delta(self, pair: _Pair, target: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return `weight * alpha / rank * up @ down` in this package's layout, float32.

        Raises:
            InvalidCheckpoint: the matrices do not fit each other, or the weight.
        """
        arrays = {role: tensor.read().astype(np.float32) for role, tensor in pair.tensors.items()}
        down, up = arrays["down"], arrays["up"]
        rank = down.shape[0]
        scale = self.weight * float(arrays["alpha"].reshape(())) / rank if "alpha" in arrays else self.weight
        try:
            flat = up.reshape(up.shape[0], -1)
            if "mid" in arrays:
                delta = np.einsum("op,pqkl,qi->oikl", flat, arrays["mid"], down.reshape(rank, -1))
            else:
                delta = (flat @ down.reshape(rank, -1)).reshape(up.shape[0], *down.shape[1:])
            if delta.ndim == 4 and len(shape) == 2:
                delta = delta[:, :, 0, 0]
            elif delta.ndim == 2 and len(shape) == 4:
                delta = delta[:, :, None, None]
            ours = from_pytorch(target, delta)
        except ValueError as exc:
            raise InvalidCheckpoint(f"the LoRA {self.name}: {some(pair.keys)} do not fit each other: {exc}") from exc
        if ours.shape != tuple(shape) or not np.isfinite(ours).all():
            raise InvalidCheckpoint(
                f"the LoRA {self.name}: {some(pair.keys)} make a change of shape {ours.shape}, and {target} has"
                f" {shape}, or they are not finite; it was made for another kind of checkpoint"
            )
        return scale * ours


def _total(deltas: Iterable[Callable[[], np.ndarray]]) -> np.ndarray:
    return np.asarray(np.sum([delta() for delta in deltas], axis=0, dtype=np.float32))


def _group(name: str, tensors: Mapping[str, StoredTensor]) -> dict[str, _Pair]:
    """Return the tensors by what they change: `part:module`, with underscores for dots as the shortest files have it.

    Raises:
        InvalidCheckpoint: a key is of a kind that is not merged, or one of two matrices is missing.
    """
    pairs: dict[str, _Pair] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, role = _split(key)
        if role is None:
            unknown.append(key)
            continue
        pair = pairs.setdefault(module, _Pair())
        pair.tensors[role] = tensor
        pair.keys.append(key)
    if unknown:
        kinds = sorted({kind for key in unknown for sign, kind in _OTHER_KINDS.items() if sign in key})
        raise InvalidCheckpoint(
            f"the LoRA {name} has keys that cannot be merged: {some(unknown)}"
            f"{' (' + ', '.join(kinds) + ')' if kinds else ''}; only LoRAs of linear layers and convolutions can, in"
            " kohya's, PEFT's or diffusers' layout"
        )
    for module, pair in pairs.items():
        if not {"down", "up"} <= set(pair.tensors) or not math.prod(pair.tensors["down"].shape):
            raise InvalidCheckpoint(f"the LoRA {name} has only one of two matrices for {module}: {some(pair.keys)}")
    return pairs


def _split(key: str) -> tuple[str, str | None]:
    """Return what a key is for, and its role; None for a key that is not known."""
    if match := _OF_PROCESSOR.match(key):
        module = "to_out.0" if match[2] == "to_out" else match[2]
        return _module(f"{match[1]}.{module}"), match[3]
    for ending, role in _ROLES.items():
        if key.endswith(f".{ending}"):
            return _module(key.removesuffix(f".{ending}")), role
    return key, None


def _module(name: str) -> str:
    for prefix, part in _KOHYA.items():
        if name.startswith(prefix):
            return f"{part}:{name.removeprefix(prefix)}"
    for prefix, part in _DOTTED.items():
        if name.startswith(prefix):
            return f"{part}:{name.removeprefix(prefix).replace('.', '_')}"
    return f"unet:{name.replace('.', '_')}"


def _targets(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return by `part:module` the name of the weight: today's names, and for a UNet the original ones too."""
    weights = {name for name in shapes if name.endswith(".weight")}
    names = {f"{part}:{_flat(name)}": name for name in weights}
    if part == "unet":
        names |= {f"{part}:{_flat(original)}": name for original, name in unet_names(shapes).items() if name in weights}
    if part.startswith("text_encoder"):
        names |= {f"{part}:{_flat(name.removeprefix('text_model.'))}": name for name in weights}
    return names


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")
