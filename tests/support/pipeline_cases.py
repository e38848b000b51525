"""The pictures that PyTorch's pipelines and the engine both draw, as data.

`tools/oracle/pipelines.py` draws them with torch and diffusers, `tests/device/test_pipelines.py` with the engine. The
noise of a seed is JAX's; `tools/oracle/noise.py` writes it down for the oracle. Nothing here needs torch or JAX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.tiny_configs import LCM_UNET, UNET, XL_UNET

_NARROW: Mapping[str, Any] = {"block_out_channels": [8, 16], "norm_num_groups": 4}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "sd": {**UNET, **_NARROW},
    "xl": {**XL_UNET, **_NARROW},
    "lcm": {**LCM_UNET, **_NARROW},
}
"""The UNet of each tiny checkpoint; its text encoders and its autoencoder are the same for all."""
SEEDS: Mapping[str, int] = {"sd": 11, "xl": 2**40 + 3, "lcm": 11}
LATENT_SHAPE = (4, 4, 4)
MOST_ROWS = 99
"""Of a sampler with two rows a step, at 50 steps."""

STEPS = (1, 4, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "skip_prk_steps": True,
}
SPACED = (
    "PNDMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
UNSPACED = ("DPMSolverSinglestepScheduler", "LCMScheduler", "TCDScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
WITH_SIGMAS = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")
NEARLY_UNGUIDED = 1.2
"""For models that predict the sample: a random one is asked for its own answer again and again, and a higher scale
would let rounding grow from step to step until nothing is left to compare."""
PROMPTS = ("a red circle on a blue background", "a small yellow star", "A green heart, on the left!")
NEGATIVE_PROMPTS = ("", "a red square", "a black background")


@dataclass(frozen=True)
class Case:
    """One picture.

    Attributes:
        family: a key of `FAMILIES`.
        scheduler: the config of the checkpoint's scheduler.
        request: what is asked for, under the names of the job's parameters, without the seed.
    """

    family: str
    scheduler: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = {key: value for key, value in self.scheduler.items() if key not in NOISE or NOISE[key] != value}
        return f"{self.family} {changed} {dict(self.request)}"


@dataclass(frozen=True)
class DdimCase:
    """One picture of a checkpoint whose scheduler is DDIM.

    Attributes:
        model: `sd` or `xl`, a key of `picture_cases.MODELS`.
        request: what is asked for, under the names of the job's parameters, without the seed.
    """

    model: str
    request: Mapping[str, Any]

    @property
    def scheduler(self) -> dict[str, Any]:
        """The config of the checkpoint's scheduler."""
        return scheduler_config("DDIMScheduler")


def cases() -> list[Case]:
    """Return every case, in the order of the golden file."""
    return [*_grid("sd"), *_grid("xl"), *_lcm(), *_options(), *_sd_requests(), *_xl_requests(), *_lcm_requests()]


def scheduler_config(class_name: str, **more: Any) -> dict[str, Any]:
    """Return a config with Stable Diffusion's noise."""
    return {"_class_name": class_name, **NOISE, **more}


def _grid(family: str) -> Iterator[Case]:
    """Yield every sampler with every prediction type, spacing and number of steps."""
    number = itertools.count()
    for name, prediction, steps in itertools.product((*SPACED, *UNSPACED, *EDM), PREDICTIONS, STEPS):
        for spacing in SPACINGS if name in SPACED else (None,):
            config = {"_class_name": name, **({} if name in EDM else NOISE), "prediction_type": prediction}
            if spacing:
                config["timestep_spacing"] = spacing
            asked = _asked(next(number), steps)
            if prediction == "sample":
                asked["guidance_scale"] = NEARLY_UNGUIDED
            yield Case(family, config, asked)


def _lcm() -> Iterator[Case]:
    for prediction, steps in itertools.product(PREDICTIONS, STEPS):
        config = scheduler_config("LCMScheduler", prediction_type=prediction)
        yield Case("lcm", config, {**_asked(0, steps), "negative_prompt": ""})


def _options() -> Iterator[Case]:
    """Yield what pipelines add to schedulers: sigmas, eta, an outdated config, zero terminal SNR."""
    for name, kind in itertools.product(WITH_SIGMAS, ("karras", "exponential", "beta")):
        yield Case("sd", scheduler_config(name, **{f"use_{kind}_sigmas": True}), _asked(1, 20))
    for family in ("sd", "xl"):
        yield Case(family, scheduler_config("DDIMScheduler"), {**_asked(1, 20), "eta": 0.5})
        yield Case(family, scheduler_config("TCDScheduler"), {**_asked(1, 4), "eta": 0.3})
        for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            yield Case(family, scheduler_config(name, steps_offset=0, timestep_spacing="leading"), _asked(1, 4))
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
            yield Case(family, scheduler_config(name, **zero), {**_asked(1, 20), "guidance_rescale": 0.7})


def _both_requests() -> Iterator[Mapping[str, Any]]:
    asked = _asked(1, 6)
    for scale in (1.0, 0.0, -2.0, 1.5, 12.0):
        yield {**asked, "guidance_scale": scale}
    for rescale in (0.7, 1.0):
        yield {**asked, "guidance_rescale": rescale}
    yield {**asked, "guidance_rescale": 0.7, "guidance_scale": 1.0}
    for negative_prompt, skip in itertools.product(("", "a red square"), (0, 1, 2)):
        yield {**asked, "negative_prompt": negative_prompt, "clip_skip": skip}
    yield {**asked, "prompt": "red " * 100}


def _sd_requests() -> Iterator[Case]:
    config = scheduler_config("DDIMScheduler")
    for request in _both_requests():
        yield Case("sd", config, request)


def _xl_requests() -> Iterator[Case]:
    config = scheduler_config("EulerDiscreteScheduler", timestep_spacing="leading")
    asked = _asked(1, 6)
    told: Sequence[Mapping[str, Any]] = (
        {"original_size": (64, 48)},
        {"crops_coords_top_left": (16, 32)},
        {"target_size": (1024, 512)},
        {"original_size": (512, 256), "crops_coords_top_left": (0, 64), "target_size": (8, 16)},
        {"prompt_2": "a purple ring"},
        {"prompt_2": "a purple ring", "negative_prompt_2": "a white background"},
        {"negative_prompt_2": "a white background"},
        {"prompt_2": "a purple ring", "negative_prompt": "", "clip_skip": 1},
    )
    for request in (*_both_requests(), *({**asked, **more} for more in told)):
        yield Case("xl", config, request)


def _lcm_requests() -> Iterator[Case]:
    config = scheduler_config("LCMScheduler")
    for more in ({"guidance_scale": 1.0}, {"guidance_scale": 8.5}, {"clip_skip": 1}):
        yield Case("lcm", config, {"prompt": PROMPTS[0], "num_inference_steps": 4, "guidance_scale": 4.0, **more})


def _asked(number: int, steps: int) -> dict[str, Any]:
    """Return a request; prompts change from case to case."""
    return {
        "prompt": PROMPTS[number % 3],
        "negative_prompt": NEGATIVE_PROMPTS[number // 3 % 3],
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
    }


SHIPPED_LATENT_SHAPE = (4, 8, 8)
SHIPPED_PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star on a black background",
    "a white heart on the left of a green background",
    "a large purple ring on an orange background",
    "a blue square on a white background",
    "a black triangle at the top of a red background",
    "an orange star on a purple background",
    "a green circle on a yellow background",
)
"""Drawn with the shipped checkpoint, each with its place in the list as its seed."""
SHIPPED_SAMPLERS = ("dpmsolver++", "ddim", "pndm")
SHIPPED_STEPS, SHIPPED_GUIDANCE_SCALE = 20, 7.5
