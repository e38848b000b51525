"""Draw the pictures of `tests/support/picture_cases.py` with PyTorch's pipelines: goldens of jobs with pictures.

Run from the repository with the oracle's virtual environment (README.md beside this file); it takes a minute on one
core and writes `tests/device/golden/pictures.npz`: `pixels` (cases, 8, 8, 3) uint8.

    python -m tools.oracle.pictures

What is random comes from `noise.npz`, as for `pipelines.py`: initial latents, the noise of every step, and that of the
autoencoder's two encodings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support import picture_cases as pictures
from tests.support.random_weights import random_tensor
from tests.support.tiny_configs import SHIPPED, TEXT, TEXT_2, TINY_VAE, VAE
from tools.oracle.golden import write_pictures
from tools.oracle.pipelines import as_diffusers_knows_it, count_rows, fill, to_uint8
from tools.oracle.samplers import Noise

_PIPELINES = {
    "image": ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "mask": ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    "edit": ("StableDiffusionInstructPix2PixPipeline", ""),
    "control": ("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
    "control image": ("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
}


class PictureNoise:
    """The noise of a job's start, in the places where pipelines draw theirs.

    Attributes:
        masked: the autoencoder encodes what the mask does not cover.
    """

    def __init__(self, initial: np.ndarray, encoded: np.ndarray) -> None:
        self._initial, self._encoded = (torch.from_numpy(each.copy()) for each in (initial[None], encoded))
        self.masked = False

    def draw_initial(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stand for `randn_tensor` in a pipeline."""
        return self._initial

    def sample(self, distribution: Any, generator: Any = None) -> torch.Tensor:
        """Stand for `DiagonalGaussianDistribution.sample`."""
        return distribution.mean + distribution.std * self._encoded[int(self.masked)][None]


def main() -> None:
    """Draw all pictures and write the file."""
    write_pictures("pictures.npz", draw_all)


def draw_all(noise: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the pictures of all cases."""
    initial, rows, encoded = (noise[f"{name} {pictures.SEED}"] for name in ("initial", "rows", "encoded"))
    parts = {model: make_parts(model) for model in pictures.MODELS}
    return [draw(case, parts[case.model], initial, rows, encoded) for case in pictures.cases()]


def make_parts(model: str) -> dict[str, Any]:
    """Return the modules of a tiny pipeline, without its scheduler."""
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    parts: dict[str, Any] = {
        "unet": fill(UNet2DConditionModel(**pictures.MODELS[model])),
        "vae": fill(AutoencoderTiny(**TINY_VAE) if model == "tiny vae" else AutoencoderKL(**VAE)),
        "text_encoder": as_diffusers_knows_it(fill(CLIPTextModel(CLIPTextConfig(**TEXT)))),
        "tokenizer": tokenizer,
    }
    if model.startswith("xl"):
        second = fill(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)))
        return {**parts, "text_encoder_2": second, "tokenizer_2": tokenizer}
    return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def make_controlnet(model: str, name: str) -> torch.nn.Module:
    """Return a ControlNet with the weights that stand for its name."""
    net = ControlNetModel(**pictures.CONTROLNETS[model])
    for tensor_name, tensor in net.named_parameters():
        tensor.copy_(torch.from_numpy(random_tensor(f"{name} {tensor_name}", tuple(tensor.shape))))
    return net.eval()


def draw(
    case: pictures.Case, parts: dict[str, Any], initial: np.ndarray, rows: np.ndarray, encoded: np.ndarray
) -> np.ndarray:
    """Return the picture of a case, `(8, 8, 3) uint8`."""
    config = dict(case.scheduler)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    is_xl = case.model.startswith("xl")
    kind = "edit" if case.model == "edit" else ("image" if case.mask is None else "mask")
    if case.controls:
        kind = "control" if case.image is None else "control image"
        nets = [make_controlnet(case.model, name) for name in case.controls]
        parts = {**parts, "controlnet": nets[0] if len(nets) == 1 else nets}
    pipeline = getattr(diffusers, _PIPELINES[kind][is_xl])(
        **parts, scheduler=scheduler, **({"add_watermarker": False} if is_xl else {})
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = PictureNoise(initial, encoded)
    _replace_noise(pipeline, noise)
    count_rows(pipeline.scheduler, Noise(lambda row: rows[row][None]))
    request = dict(case.request)
    if not request["negative_prompt"]:
        request.pop("negative_prompt")
    if case.image is not None:
        request["image"] = Image.fromarray(pictures.make_image(case.image))
    if case.controls:
        seen = [Image.fromarray(pictures.make_image(number)) for number in case.controls.values()]
        request["image" if case.image is None else "control_image"] = seen[0] if len(seen) == 1 else seen
        request |= {"height": pictures.SIZE, "width": pictures.SIZE}
    if case.mask is not None:
        request["mask_image"] = Image.fromarray(pictures.make_mask(case.mask))
        request |= {"height": pictures.SIZE, "width": pictures.SIZE}
    image = np.asarray(pipeline(**request, output_type="np").images[0])
    assert np.isfinite(image).all(), case
    return to_uint8(image)


def _replace_noise(pipeline: Any, noise: PictureNoise) -> None:
    """Have a pipeline draw its noise from `noise`."""
    module = importlib.import_module(type(pipeline).__module__)
    module.randn_tensor = noise.draw_initial  # type: ignore[attr-defined]
    vae = importlib.import_module("diffusers.models.autoencoders.vae")
    vae.DiagonalGaussianDistribution.sample = lambda self, generator=None: noise.sample(self, generator)
    prepare = getattr(pipeline, "prepare_mask_latents", None)
    if prepare is not None:

        def prepare_masked(*args: Any, **kwargs: Any) -> Any:
            noise.masked = True
            return prepare(*args, **kwargs)

        pipeline.prepare_mask_latents = prepare_masked


if __name__ == "__main__":
    main()
