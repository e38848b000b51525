"""The pictures that jobs with LoRAs of their own draw, by PyTorch's pipelines and by the engine, as data.

`tools/oracle/adapters.py` draws them with torch, diffusers and peft, `tests/device/test_adapters.py` with the engine.
Nothing here needs torch or JAX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.support.picture_cases import MODELS, SEED, SIZE
from tests.support.pipeline_cases import PROMPTS, DdimCase
from tests.support.random_weights import random_tensor

__all__ = ["MODELS", "SEED", "SIZE"]

LAYOUTS = ("kohya", "diffusers", "peft")
WEIGHTS = (0.0, 0.5, 1.0, -0.5)
RANK, ALPHA = 4, 2.0
_TRAINED: Mapping[str, Sequence[str]] = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_ROLES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "diffusers text": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
}


@dataclass(frozen=True)
class Case(DdimCase):
    """One picture; its request is without the LoRAs.

    Attributes:
        loras: layouts of the LoRAs, which differ by their numbers as well, with the weights.
    """

    loras: Sequence[tuple[str, float]]


def cases() -> list[Case]:
    """Return every case, in the order of the golden file."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for model in ("sd", "xl"):
        number = itertools.count()
        several = (("kohya", 0.7), ("peft", -0.4))
        for loras in (*([pair] for pair in itertools.product(LAYOUTS, WEIGHTS)), several):
            i = next(number)
            request = {
                "prompt": PROMPTS[i % 3],
                "negative_prompt": ("", "a red square")[i % 2],
                "num_inference_steps": 6,
                "guidance_scale": (3.0, 1.0)[i % 5 == 4],
            }
            yield Case(model, request, loras)


def lora_tensors(layout: str, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Return the tensors of the LoRA that stands for a layout, by their keys.

    Args:
        layout: one of `LAYOUTS`.
        shapes: by part and name, the shapes of the model's parameters in PyTorch's layout.
    """
    tensors: dict[str, np.ndarray] = {}
    for part, names in shapes.items():
        for name, shape in names.items():
            module = name.removesuffix(".weight")
            if not _is_trained(part, name):
                continue
            key = f"{part}.{module}"
            if layout == "kohya":
                prefix = "lora_te1_" if part == "text_encoder" and "text_encoder_2" in shapes else _KOHYA[part]
                key = prefix + _with_text_model(part, module).replace(".", "_")
                tensors[f"{key}.alpha"] = np.array(ALPHA, np.float32)
            elif part != "unet":
                key = f"{part}.{_with_text_model(part, module)}"
            roles = "diffusers text" if layout == "diffusers" and part != "unet" else layout
            kernel = shape[2:]
            for role, its_shape in zip(
                _ROLES[roles], ((RANK, shape[1], *kernel), (shape[0], RANK, *[1] * len(kernel))), strict=True
            ):
                tensors[f"{key}.{role}"] = random_tensor(f"{layout} {part} {module} {role}", its_shape)
    return tensors


def _is_trained(part: str, name: str) -> bool:
    in_transformer = part != "unet" or ".attentions." in name
    ends = _TRAINED["unet" if part == "unet" else "text"]
    return in_transformer and any(name.endswith(f".{end}.weight") for end in ends)


def _with_text_model(part: str, module: str) -> str:
    """Return the name with the prefix of transformers 4, which files of LoRAs have."""
    return module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
