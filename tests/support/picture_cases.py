"""The pictures that start from pictures, drawn by PyTorch's pipelines and by the engine, as data.

`tools/oracle/pictures.py` draws them with torch and diffusers, `tests/device/test_pictures.py` with the engine. Nothing
here needs torch or JAX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.pipeline_cases import PROMPTS, scheduler_config
from tests.support.tiny_configs import UNET, XL_UNET

_NARROW: Mapping[str, Any] = {"block_out_channels": [8, 16], "norm_num_groups": 4}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "sd": {**UNET, **_NARROW},
    "xl": {**XL_UNET, **_NARROW},
    "inpainting": {**UNET, **_NARROW, "in_channels": 9},
    "xl inpainting": {**XL_UNET, **_NARROW, "in_channels": 9},
    "edit": {**UNET, **_NARROW, "in_channels": 8},
    "tiny vae": {**UNET, **_NARROW},
    "control": {**UNET, **_NARROW},
    "xl control": {**XL_UNET, **_NARROW},
}
"""The UNet of each tiny checkpoint; one has an `AutoencoderTiny`, the last two have ControlNets."""
_LEFT_OUT = ("sample_size", "up_block_types")
CONTROLNETS: Mapping[str, Mapping[str, Any]] = {
    model: {
        **{key: value for key, value in MODELS[model].items() if key not in _LEFT_OUT},
        "conditioning_embedding_out_channels": [4, 8],
    }
    for model in ("control", "xl control")
}
"""The ControlNets `edges` and `pose` of a model; they differ by their weights."""
CONTROL_NAMES = ("edges", "pose")
SEED = 11
SIZE = 8
_SAMPLERS = (
    "PNDMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
)


@dataclass(frozen=True)
class Case:
    """One picture.

    Attributes:
        model: a key of `MODELS`.
        scheduler: the config of the checkpoint's scheduler.
        request: what is asked for, under the names of the job's parameters, without the seed.
        image: number of the image.
        mask: number of the mask; None for none.
        controls: by name, the number of the image that a ControlNet sees.
    """

    model: str
    scheduler: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    image: int | None = 0
    mask: int | None = None
    controls: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model} {self.scheduler['_class_name']} {dict(self.request)} {self.image} {self.mask}"


def make_image(number: int) -> np.ndarray:
    """Return an image, `(SIZE, SIZE, 3) uint8`: a gradient with some noise."""
    draw = np.random.default_rng(100 + number)
    corners = draw.integers(0, 256, (2, 2, 3)).astype(float)
    along = np.linspace(0, 1, SIZE)
    rows = corners[0][None] * (1 - along)[:, None, None] + corners[1][None] * along[:, None, None]
    smooth = rows[:, :1] * (1 - along)[None, :, None] + rows[:, 1:] * along[None, :, None]
    return np.clip(smooth + draw.normal(0, 10, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def make_mask(number: int) -> np.ndarray:
    """Return which pixels are to be drawn again, `(SIZE, SIZE) bool`: a half, a rectangle, scattered pixels, all."""
    mask = np.zeros((SIZE, SIZE), bool)
    if number == 0:
        mask[:, SIZE // 2 :] = True
    elif number == 1:
        mask[1:6, 3:7] = True
    elif number == 2:
        mask = np.random.default_rng(7).random((SIZE, SIZE)) < 0.5
    else:
        mask[:] = True
    return mask


def cases() -> list[Case]:
    """Return every case, in the order of the golden file."""
    return [*_image_to_image(), *_masked("sd"), *_masked("xl"), *_inpainting(), *_edits(), *_tiny_vae(), *_controls()]


def _asked(number: int, steps: int = 10, **more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[number % 3],
        "negative_prompt": ("", "a red square")[number % 2],
        "num_inference_steps": steps,
        "guidance_scale": (3.0, 1.0)[number % 5 == 4],
        **more,
    }


def _image_to_image() -> Iterator[Case]:
    number = itertools.count()
    for model, name, strength in itertools.product(("sd", "xl"), _SAMPLERS, (0.3, 0.8, 1.0)):
        i = next(number)
        yield Case(model, scheduler_config(name), _asked(i, 10, strength=strength), image=i % 3)


def _masked(model: str) -> Iterator[Case]:
    number = itertools.count()
    for name, strength in itertools.product(_SAMPLERS, (0.5, 1.0)):
        i = next(number)
        yield Case(model, scheduler_config(name), _asked(i, 10, strength=strength), i % 3, i % 4)


def _inpainting() -> Iterator[Case]:
    number = itertools.count()
    for model, name, strength in itertools.product(("inpainting", "xl inpainting"), _SAMPLERS, (0.5, 1.0)):
        i = next(number)
        yield Case(model, scheduler_config(name), _asked(i, 10, strength=strength), i % 3, i % 4)


def _tiny_vae() -> Iterator[Case]:
    for i, strength in enumerate((0.3, 0.8, 1.0)):
        yield Case("tiny vae", scheduler_config("DDIMScheduler"), _asked(i, 10, strength=strength), image=i)


def _controls() -> Iterator[Case]:
    number = itertools.count()
    asked: Sequence[tuple[dict[str, Any], dict[str, int]]] = (
        ({}, {"edges": 3}),
        ({"controlnet_conditioning_scale": 0.5}, {"pose": 4}),
        ({"control_guidance_start": 0.3, "control_guidance_end": 0.8}, {"edges": 5}),
        ({"controlnet_conditioning_scale": [0.8, 0.4], "control_guidance_end": [1.0, 0.5]}, {"edges": 3, "pose": 4}),
    )
    for model, name, (more, controls) in itertools.product(CONTROLNETS, _SAMPLERS[1:6], asked):
        i = next(number)
        yield Case(model, scheduler_config(name), _asked(i, 10, **more), None, None, controls)
    for model in CONTROLNETS:  # from a picture
        more = {"strength": 0.6, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 0.9}
        yield Case(model, scheduler_config("DDIMScheduler"), _asked(1, 10, **more), 1, None, {"edges": 3})


def _edits() -> Iterator[Case]:
    number = itertools.count()
    scales: Sequence[tuple[float, float]] = ((7.5, 1.5), (3.0, 1.0), (1.0, 1.5), (3.0, 0.5))
    for name, (scale, image_scale) in itertools.product(_SAMPLERS, scales):
        i = next(number)
        asked = _asked(i, 6, guidance_scale=scale, image_guidance_scale=image_scale)
        yield Case("edit", scheduler_config(name), asked, image=i % 3)
