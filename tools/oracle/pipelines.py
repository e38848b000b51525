"""Draw the pictures of `tests/support/pipeline_cases.py` with PyTorch's pipelines: goldens of the whole way.

Run from the repository with the oracle's virtual environment (README.md beside this file); it takes five minutes on one
core and writes into `tests/device/golden`, 330 KB together:

    python -m tools.oracle.pipelines

* `pipelines.npz`: `pixels` (cases, 8, 8, 3) uint8, `runs` (cases,) bool, whether there is a picture to compare with.
* `pipelines.json`: the versions, and why there is none: the scheduler does not run, or rounding decides what it shows.
* `shipped-*.png`: the shipped checkpoint's pictures with each sampler, one prompt above the other.

The tiny models are built from their configs and get the weights that stand for the names of their tensors
(`tests/support/random_weights.py`), as the tests' checkpoints do; nothing is written to disk. What is random is not
theirs: initial latents and the noise of every step come from `noise.npz`, which `tools/oracle/noise.py` makes with the
worker's environment, because it is JAX's.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support import pipeline_cases as pictures
from tests.support.random_weights import random_tensor
from tests.support.tiny_configs import SHIPPED, TEXT, TEXT_2, VAE
from tools.oracle.golden import GOLDEN, read_noise
from tools.oracle.names import name_in_files
from tools.oracle.samplers import Noise

Seeded = tuple[dict[str, Any], np.ndarray, np.ndarray]
"""The parts of a pipeline, the initial latents, and the noise of each row."""
_ROUNDING = 1e-5
"""How far, relatively, the models of two libraries may differ in float32."""
_DOES_NOT_RUN = (ValueError, NotImplementedError, RuntimeError, IndexError, UnboundLocalError, AssertionError)


def main() -> None:
    """Draw all pictures and write the files."""
    noise = read_noise()
    with torch.no_grad():
        _draw_shipped(noise["shipped"])
        _draw_cases(noise)


def _draw_cases(noise: Mapping[str, np.ndarray]) -> None:
    parts = {family: make_parts(family) for family in pictures.FAMILIES}
    pixels, runs, errors = [], [], {}
    for i, case in enumerate(pictures.cases()):
        seed = pictures.SEEDS[case.family]
        image, why_not = _try(case, (parts[case.family], noise[f"initial {seed}"], noise[f"rows {seed}"]))
        if why_not:
            errors[i] = why_not
        runs.append(not why_not)
        pixels.append(np.zeros((8, 8, 3), np.uint8) if why_not else to_uint8(image))
    np.savez_compressed(GOLDEN / "pipelines.npz", allow_pickle=False, pixels=np.stack(pixels), runs=np.array(runs))
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    (GOLDEN / "pipelines.json").write_text(json.dumps({**versions, "no picture": errors}, indent=1) + "\n")
    print(f"{len(pixels)} cases, {len(errors)} of them without a picture")


def _try(case: pictures.Case, seeded: Seeded) -> tuple[np.ndarray, str]:
    """Return the picture of a case, and why it is none to compare with, or nothing."""
    try:
        image = draw(case, *seeded)
    except _DOES_NOT_RUN as exc:
        return np.zeros(()), f"{type(exc).__name__}: {str(exc)[:60]}"
    if not np.isfinite(image).all():
        return image, "not finite"
    if case.scheduler.get("prediction_type") == "sample" and not is_stable(case, image, seeded):
        return image, "rounding decides"
    return image, ""


def _draw_shipped(latents: np.ndarray) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        SHIPPED, safety_checker=None, feature_extractor=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    schedulers = {
        "dpmsolver++": own,
        "ddim": DDIMScheduler.from_config(own.config),
        "pndm": PNDMScheduler.from_config(own.config),
    }
    for sampler in pictures.SHIPPED_SAMPLERS:
        pipeline.scheduler = schedulers[sampler]
        images = pipeline(
            list(pictures.SHIPPED_PROMPTS),
            num_inference_steps=pictures.SHIPPED_STEPS,
            guidance_scale=pictures.SHIPPED_GUIDANCE_SCALE,
            latents=torch.from_numpy(latents.copy()),
            output_type="np",
        ).images
        column = Image.fromarray(to_uint8(np.concatenate(list(images))))
        column.save(GOLDEN / f"shipped-{sampler}.png", optimize=True)


def make_parts(family: str) -> dict[str, Any]:
    """Return the modules of a tiny pipeline, without its scheduler."""
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    parts: dict[str, Any] = {
        "unet": fill(UNet2DConditionModel(**pictures.FAMILIES[family])),
        "vae": fill(AutoencoderKL(**VAE)),
        "text_encoder": as_diffusers_knows_it(fill(CLIPTextModel(CLIPTextConfig(**TEXT)))),
        "tokenizer": tokenizer,
    }
    if family == "xl":
        second = fill(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)))
        return {**parts, "text_encoder_2": second, "tokenizer_2": tokenizer}
    return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter the weights that stand for its name."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(random_tensor(name_in_files(name), tuple(tensor.shape))))
    return model.eval()


def as_diffusers_knows_it(model: torch.nn.Module) -> torch.nn.Module:
    """Give a text encoder the level that transformers 5 left out and that `clip_skip` of the pipelines still reads."""
    if not hasattr(model, "text_model"):
        # Not as a module: it would be one within itself.
        object.__setattr__(model, "text_model", SimpleNamespace(final_layer_norm=model.final_layer_norm))
    return model


def draw(case: pictures.Case, parts: dict[str, Any], latents: np.ndarray, noise_of_rows: np.ndarray) -> np.ndarray:
    """Return the picture of a case, `(8, 8, 3)` of 0 to 1."""
    config = dict(case.scheduler)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    classes: dict[str, Callable[..., Any]] = {
        "sd": StableDiffusionPipeline,
        "xl": StableDiffusionXLPipeline,
        "lcm": LatentConsistencyModelPipeline,
    }
    more = {"add_watermarker": False} if case.family == "xl" else {}
    pipeline = classes[case.family](**parts, scheduler=scheduler, **more)
    pipeline.set_progress_bar_config(disable=True)
    count_rows(pipeline.scheduler, Noise(lambda row: noise_of_rows[row][None]))
    request = dict(case.request)
    request["clip_skip"] = request.get("clip_skip") or None
    # An empty negative prompt is none at all, to a job; but an XL pipeline forgets the second one if the first is None.
    if not request.get("negative_prompt") and not request.get("negative_prompt_2"):
        request.pop("negative_prompt", None)
    images = pipeline(**request, latents=torch.from_numpy(latents[None].copy()), output_type="np").images
    return np.asarray(images[0])


def is_stable(case: pictures.Case, image: np.ndarray, seeded: Seeded) -> bool:
    """Return whether the picture stays what it is when the noise changes by as much as rounding does.

    A random model that predicts the sample, asked 50 times for its own answer, leads PyTorch itself elsewhere.
    """
    parts, latents, noise_of_rows = seeded
    factor = np.float32(1 + _ROUNDING)
    other = draw(case, parts, latents * factor, noise_of_rows * factor)
    return int(np.abs(to_uint8(image).astype(int) - to_uint8(other)).max()) <= 2


def count_rows(scheduler: Any, noise: Noise) -> None:
    """Hand a scheduler the noise of its rows, one each time that it steps."""
    module = importlib.import_module(type(scheduler).__module__)
    for name, stand_in in (("randn_tensor", noise.randn_tensor), ("BrownianTreeNoiseSampler", noise.make_sampler)):
        if hasattr(module, name):
            setattr(module, name, stand_in)
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        noise.row += 1
        return result

    scheduler.step = counted


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Return pixels of 0 to 1 as bytes."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


if __name__ == "__main__":
    main()
