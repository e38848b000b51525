"""Whose weight a key of a LoRA file is about: kohya's flat names, diffusers' old and new ones, PEFT's.

kohya writes a module's path with `_` for `.`, which cannot be undone by rule (`to_out_0`, `proj_in`). So every name is
flattened like that and looked up among the model's own, and for the UNet among the original ones too, which is what
files for SDXL use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from sdtpu_worker.diffusion.loading.original_names import original_unet_names
from sdtpu_worker.diffusion.loading.tensors import Shapes

_KOHYA_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# The ends of keys by what they hold; the rest before them names the module.
_ROLES = (
    ("down", (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight",
              "_lora.down.weight", ".lora_linear_layer.down.weight")),
    ("up", (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight",
            "_lora.up.weight", ".lora_linear_layer.up.weight")),
    ("mid", (".lora_mid.weight",)),
    ("alpha", (".lora.alpha", "_lora.alpha", ".lora_linear_layer.alpha", ".alpha")),
)  # fmt: skip
_OTHER_KINDS = (
    (r".*\.hada_", "LoHa"),
    (r".*\.lokr_", "LoKr"),
    (r".*(\.dora_scale|\.lora_magnitude_vector)", "DoRA"),
    (r".*\.(oft_|oft_blocks)", "OFT"),
    (r".*\.(diff|diff_b)$", "full differences"),
    (r".*\.(w_norm|b_norm)$", "norms"),
    (r".*\.on_input$", "IA3"),
    (r".*\.lora_(A|B|up|down).*\.bias$", "LoRA with a bias"),
)
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_TEXT_MODULES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module and the role of a key, or None if it is no LoRA's: down, up, mid or alpha."""
    for role, ends in _ROLES:
        for end in ends:
            if key.endswith(end):
                return key[: -len(end)], role
    return None


def describe_kind(key: str) -> str:
    """Return what kind of change a key belongs to that is not served."""
    return next((kind for pattern, kind in _OTHER_KINDS if re.match(pattern, key)), "unknown")


class ModuleNames:
    """Finds the model and the weight that a LoRA's module means.

    Args:
        shapes: of the parameters by part, `unet`, `text_encoder`, `text_encoder_2`; their names decide.
    """

    def __init__(self, shapes: Mapping[str, Shapes]) -> None:
        self._names: dict[str, dict[str, str]] = {}
        for part, names in shapes.items():
            flat = {_flat(name): name for name in names if name.endswith(".weight")}
            if part == "unet":
                originals = original_unet_names(names).items()
                flat |= {_flat(original.name): name for name, original in originals if name.endswith(".weight")}
            self._names[part] = flat

    def find(self, module: str) -> tuple[str, str] | None:
        """Return the part and the name of the weight, or None if no model has it."""
        part, spellings = _places(module)
        names = self._names.get(part, {})
        name = next((names[spelling] for spelling in spellings if spelling in names), None)
        return (part, name) if name else None


def split_part(module: str) -> tuple[str, str]:
    """Return the part that a module with dots begins with, and the rest; without one it is the UNet's."""
    module = module.removeprefix("base_model.model.")
    part, _dot, rest = module.partition(".")
    return (part, rest) if part in _PARTS and rest else ("unet", module)


def _places(module: str) -> tuple[str, Iterator[str]]:
    for prefix, part in _KOHYA_PARTS.items():
        if module.startswith(prefix):
            return part, _with_prefix(module.removeprefix(prefix))
    part, rest = split_part(module)
    return part, _spellings(rest)


def _spellings(module: str) -> Iterator[str]:
    """Yield what a module with dots is called today: old attention processors, old text encoders."""
    name = module.removeprefix("base_model.model.").replace(".processor.", ".")
    yield from _with_prefix(_flat(name))
    rest, _dot, last = name.rpartition(".")
    if last == "to_out":
        yield _flat(f"{rest}.to_out.0")
    if last in _TEXT_MODULES:
        yield from _with_prefix(_flat(f"{rest}.{_TEXT_MODULES[last]}"))


def _with_prefix(flat: str) -> Iterator[str]:
    """Yield the name with and without the prefix that text encoders of transformers 5 lack."""
    yield flat
    yield f"text_model_{flat}"
    yield flat.removeprefix("text_model_")


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")
