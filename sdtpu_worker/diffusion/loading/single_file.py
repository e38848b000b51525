"""One original-layout `.safetensors` file with a whole checkpoint, as people share Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sdtpu_worker.diffusion.loading.architectures import NAMES
from sdtpu_worker.diffusion.loading.original_names import (
    Original,
    original_clip_names,
    original_openclip_names,
    original_unet_names,
    original_vae_names,
)
from sdtpu_worker.diffusion.loading.recognise import describe_family
from sdtpu_worker.diffusion.loading.safetensors_file import REMEDY, open_safetensors
from sdtpu_worker.diffusion.loading.tensors import Shapes, StoredTensor, TensorSource, some
from sdtpu_worker.errors import InvalidCheckpoint

Rule = Callable[[Collection[str]], dict[str, Original]]
_UNET = ("model.diffusion_model.", original_unet_names)
_VAE = ("first_stage_model.", original_vae_names)
# By architecture, what each part's names begin with and how they go on; the most telling text encoder comes first.
_LAYOUTS: dict[str, dict[str, tuple[str, Rule]]] = {
    "sdxl": {
        "text_encoder_2": ("conditioner.embedders.1.model.", original_openclip_names),
        "text_encoder": ("conditioner.embedders.0.transformer.", original_clip_names),
        "unet": _UNET,
        "vae": _VAE,
    },
    "sd2": {
        "text_encoder": ("cond_stage_model.model.", original_openclip_names),
        "unet": _UNET,
        "vae": _VAE,
    },
    "sd1": {
        "text_encoder": ("cond_stage_model.transformer.", original_clip_names),
        "unet": _UNET,
        "vae": _VAE,
    },
}
_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_REMEDY = (
    "a file must have the sizes of a published Stable Diffusion 1.x, 2.x or XL; convert it into a folder in the"
    " diffusers layout, which has configs"
)
_MARKS = ("v_pred", "ztsnr")
# What else is in such files, and why it is not needed. Anything more is an error.
_IGNORED = (
    (r"model_ema\..*", "a moving average beside the weights; people's files have it when they were not pruned"),
    (r"(.*\.)?position_ids", "a constant"),
    (r".*\.logit_scale|.*\.attn_mask", "of OpenCLIP's training, and a constant"),
    (r".*\.text_projection(\.weight)?", "a text encoder without a pooled output has no use for it"),
    (r"cond_stage_model\.model\.transformer\.resblocks\.23\..*", "the last layer, whose output 2.x does not take"),
    (r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor"
     r"|denoiser\.sigmas", "the noise schedule of the training, which follows from the config"),
    (r"first_stage_model\.loss\..*|loss\..*", "the VAE's discriminator"),
    ("|".join(_MARKS), "marks, see `SingleFile.marks`"),
)  # fmt: skip


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file; only its header is in memory.

    Attributes:
        path: of the file.
        architecture: `sd1`, `sd2` or `sdxl`.
        in_channels: of the UNet: 4, 8 (image instructions) or 9 (inpainting).
        marks: `v_pred` and `ztsnr`, empty tensors by which XL files say how they were trained.
        tensors: by name.
    """

    path: Path
    architecture: str
    in_channels: int
    marks: frozenset[str]
    tensors: Mapping[str, StoredTensor]

    @property
    def parts(self) -> tuple[str, ...]:
        """The models that the file holds."""
        return tuple(sorted(_LAYOUTS[self.architecture]))

    def part(self, part: str, shapes: Shapes) -> TensorSource:
        """Return the tensors of one model, under its own names.

        Args:
            part: one of `parts`.
            shapes: of the model's parameters, whose names decide; see `iterate_weights`.
        """
        prefix, rule = _LAYOUTS[self.architecture][part]
        found, used = {}, set()
        for name, original in rule(shapes).items():
            stored = self._find(prefix, original.name)
            if stored in self.tensors:
                found[name] = _taken(self.tensors[stored], original)
                used.add(stored)
        left = {name: tensor for name, tensor in self.tensors.items()
                if name.startswith(prefix) and name not in used and not _is_ignored(name)}  # fmt: skip
        return TensorSource(f"{self.path}, {part}", found | left, _REMEDY)

    def _find(self, prefix: str, name: str) -> str:
        """Return the stored name; the oldest files have CLIP-L without its `text_model.`."""
        stored = prefix + name
        return stored if stored in self.tensors else prefix + name.removeprefix("text_model.")


def open_single_file(path: Path) -> SingleFile:
    """Open a checkpoint in one original-layout `.safetensors` file; only its header is read.

    Raises:
        InvalidCheckpoint: the file is no safetensors file, or of another kind, or lacks a part, or has tensors that
            belong to nothing.
    """
    if path.suffix != ".safetensors":
        raise InvalidCheckpoint(
            f"{path} must be a .safetensors file; .ckpt, .pt and .bin files are pickles, which can run code when they"
            f" are opened, and are never read; {REMEDY.replace('from_pretrained', 'from_single_file')}"
        )
    tensors, _metadata = open_safetensors(path)
    architecture = _recognise(path, tensors)
    prefixes = tuple(prefix for prefix, _rule in _LAYOUTS[architecture].values())
    if foreign := [name for name in tensors if not name.startswith(prefixes) and not _is_ignored(name)]:
        raise InvalidCheckpoint(
            f"{path} has tensors that belong to no part of {NAMES[architecture]}: {some(foreign)}; a file with more"
            " than the checkpoint itself (ControlNet, scaled float8, EDM) must be saved again without it, or loaded as"
            " a folder in the diffusers layout"
        )
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 0
    if channels not in (4, 8, 9):
        raise InvalidCheckpoint(f"{path}: the UNet must take 4, 8 or 9 channels, got {channels}; {_REMEDY}")
    return SingleFile(path, architecture, channels, frozenset(_MARKS) & tensors.keys(), tensors)


def _recognise(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the architecture whose parts a file has.

    Raises:
        InvalidCheckpoint: it has those of none; the text says what the file looks like.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    looks_like = f"it looks like {describe_family(shapes)}"
    if any(name.startswith(("unet.", "down_blocks.", "vae.")) for name in tensors):
        looks_like += " in the diffusers layout"
    if not any(name.startswith(_UNET[0]) for name in tensors):
        raise InvalidCheckpoint(
            f"{path} is not a whole checkpoint in the original layout (no {_UNET[0]}*): {looks_like}; a folder in the"
            " diffusers layout, or a file of Stable Diffusion 1.x, 2.x or XL, is what sdtpu_model takes"
        )
    lacking = {architecture: _lacking(architecture, tensors) for architecture in _LAYOUTS}
    for architecture, parts in lacking.items():
        if not parts:
            return architecture
    context = next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape), None)
    what = f"it lacks {lacking[_CONTEXTS[context]]}" if context in _CONTEXTS else "it is of no kind that is served"
    raise InvalidCheckpoint(
        f"{path} is no whole checkpoint: {looks_like}, and {what}; take a file of Stable Diffusion 1.x, 2.x or XL with"
        " all parts, or put the parts into a folder in the diffusers layout"
    )


def _lacking(architecture: str, names: Iterable[str]) -> str:
    """Return the parts of an architecture of which there is no tensor."""
    return ", ".join(
        f"{part} ({prefix}*)"
        for part, (prefix, _rule) in _LAYOUTS[architecture].items()
        if not any(name.startswith(prefix) for name in names)
    )


def _is_ignored(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern, _reason in _IGNORED)


def _taken(tensor: StoredTensor, original: Original) -> StoredTensor:
    """Return the tensor as the model has it: a third of the rows, or turned."""
    shape = tensor.shape
    if original.third is not None and shape and shape[0] % 3 == 0:
        rows = shape[0] // 3
        return tensor.changed((rows, *shape[1:]), partial(_rows, first=rows * original.third, count=rows))
    if original.transposed:
        return tensor.changed(shape[::-1], np.transpose)
    return tensor


def _rows(array: np.ndarray, first: int, count: int) -> np.ndarray:
    return array[first : first + count]
