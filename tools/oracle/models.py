"""Make the golden files of the models: what PyTorch's own models give for the tiny ones of the tests.

Run from the repository with the oracle's virtual environment (README.md beside this file); it takes about ten seconds
on one core and writes `tests/device/golden/models-*.npz`, about 100 KB:

    python -m tools.oracle.models
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.support import model_variants as variants
from tests.support.random_weights import random_tensor
from tools.oracle.names import name_in_files

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden"


def main() -> None:
    """Write the golden files."""
    torch.manual_seed(0)
    GOLDEN.mkdir(exist_ok=True)
    with torch.no_grad():
        _save("unet", {name: _run_unet(name) for name in variants.UNETS})
        _save("controlnet", {key: value for name in variants.CONTROLNETS for key, value in _run_controlnet(name)})
        _save("clip", {f"{name}/{key}": value for name in variants.CLIPS for key, value in _run_clip(name).items()})
        _save("vae", {f"{name}/{key}": value for name in variants.VAES for key, value in _run_vae(name).items()})
        tiny = {f"{name}/{key}": value for name in variants.TINY_VAES for key, value in _run_tiny(name).items()}
        _save("tiny-vae", tiny)
        _save("safety", _run_safety_checker())


def _save(name: str, arrays: dict[str, np.ndarray]) -> None:
    path = GOLDEN / f"models-{name}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def _fill(model: torch.nn.Module) -> None:
    """Give a model the weights that stand for its tensors' names, as they are in files of before transformers 5."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("position_ids"):
            continue
        tensor.copy_(torch.from_numpy(random_tensor(name_in_files(name), tuple(tensor.shape))))
    model.eval()


def _nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(0, 3, 1, 2).copy())


def _nhwc(image: torch.Tensor) -> np.ndarray:
    return image.numpy().transpose(0, 2, 3, 1).copy()


def _run_unet(name: str) -> np.ndarray:
    model = UNet2DConditionModel(**variants.UNETS[name])
    _fill(model)
    inputs = variants.unet_inputs(name)
    added = {key: torch.from_numpy(inputs[key]) for key in ("text_embeds", "time_ids") if key in inputs}
    condition = inputs.get("timestep_cond")
    out = model(
        _nchw(inputs["sample"]),
        torch.from_numpy(inputs["timesteps"]),
        torch.from_numpy(inputs["context"]),
        timestep_cond=None if condition is None else torch.from_numpy(condition),
        added_cond_kwargs=added or None,
    )
    return _nhwc(out.sample)


def _run_controlnet(name: str) -> Iterator[tuple[str, np.ndarray]]:
    model = ControlNetModel(**variants.CONTROLNETS[name])
    _fill(model)
    inputs = variants.controlnet_inputs(name)
    out = model(
        _nchw(inputs["sample"]),
        torch.from_numpy(inputs["timesteps"]),
        torch.from_numpy(inputs["context"]),
        _nchw(inputs["picture"]),
        conditioning_scale=1.0,
        added_cond_kwargs={key: torch.from_numpy(inputs[key]) for key in ("text_embeds", "time_ids") if key in inputs},
    )
    for i, residual in enumerate([*out.down_block_res_samples, out.mid_block_res_sample]):
        yield f"{name}/{i}", _nhwc(residual)


def _run_clip(name: str) -> dict[str, np.ndarray]:
    projects = variants.has_projection(name)
    kind: Any = CLIPTextModelWithProjection if projects else CLIPTextModel
    model = kind(CLIPTextConfig(**variants.CLIPS[name]))
    _fill(model)
    out = model(torch.from_numpy(variants.clip_inputs(name)).long(), output_hidden_states=True)
    return {
        "last_hidden_state": out.last_hidden_state.numpy(),
        "second_to_last": out.hidden_states[-2].numpy(),
        "pooled": (out.text_embeds if projects else out.pooler_output).numpy(),
    }


def _run_vae(name: str) -> dict[str, np.ndarray]:
    model = AutoencoderKL(**variants.VAES[name])
    _fill(model)
    inputs = variants.vae_inputs(name)
    moments = model.encode(_nchw(inputs["image"])).latent_dist
    return {
        "image": _nhwc(model.decode(_nchw(inputs["latents"])).sample),
        "mean": _nhwc(moments.mean),
        "logvar": _nhwc(moments.logvar),
    }


def _run_tiny(name: str) -> dict[str, np.ndarray]:
    model = AutoencoderTiny(**{key: value for key, value in variants.TINY_VAES[name].items() if key[0] != "_"})
    _fill(model)
    inputs = variants.vae_inputs(name)
    return {
        "image": _nhwc(model.decode(_nchw(inputs["latents"])).sample),
        "latents": _nhwc(model.encode(_nchw(inputs["image"])).latents),
    }


def _run_safety_checker() -> dict[str, np.ndarray]:
    model = StableDiffusionSafetyChecker(CLIPConfig(**variants.SAFETY_CHECKER))
    _fill(model)
    pixels = _nchw(variants.safety_inputs())
    embeds = model.visual_projection(model.vision_model(pixels)[1])
    _, flags = model(pixels, [np.zeros((8, 8, 3))] * len(pixels))
    care = cosine_distance(embeds, model.special_care_embeds) - model.special_care_embeds_weights
    return {"flags": np.array(flags), "special_care": (care > 0).any(-1).numpy(), "embeds": embeds.numpy()}


if __name__ == "__main__":
    main()
