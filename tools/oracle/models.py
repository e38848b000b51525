"""Write what PyTorch's networks make of random weights and inputs: the golden outputs of `tests/device/test_models.py`.

    python -m tools.oracle.models

Needs torch, diffusers and transformers, see README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.device.model_variants import CHECKERS, TEXT_IDS, TEXTS, UNETS, VAES
from tests.support.random_weights import draw, inputs

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden"


def main() -> None:
    """Run every variant, and write one file."""
    torch.manual_seed(0)
    outputs: dict[str, Any] = {}
    with torch.no_grad():
        for name, config in UNETS.items():
            outputs[f"unet/{name}"] = run_unet(config)
        for name, config in VAES.items():
            outputs[f"decoder/{name}"], outputs[f"encoder/{name}"] = run_vae(config)
        for name, config in TEXTS.items():
            for what, value in run_text(config).items():
                outputs[f"text/{name}/{what}"] = value
        for name, config in CHECKERS.items():
            outputs[f"checker/{name}"] = run_checker(config)
    GOLDEN.mkdir(exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    np.savez_compressed(GOLDEN / "models.npz", **arrays)  # type: ignore[arg-type]  # its stub takes any keyword for `allow_pickle`
    print(f"{len(outputs)} outputs, {(GOLDEN / 'models.npz').stat().st_size:,} bytes")


def fill(model: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """Give every parameter its random weight, and every buffer of floating point; return the model."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(draw(prefix + name, tensor.shape)))
    return model.eval()


def run_unet(config: dict[str, Any]) -> torch.Tensor:
    """Return `(2, h, w, C)`."""
    unet = fill(UNet2DConditionModel(**config))
    size = config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    more: dict[str, Any] = {}
    if config.get("addition_embed_type"):
        time_ids = np.array([[64, 48, 0, 8, 64, 64], [32, 32, 0, 0, 64, 32]], np.float32)
        more["added_cond_kwargs"] = {
            "text_embeds": torch.from_numpy(inputs("text_embeds", 2, 16)),
            "time_ids": torch.from_numpy(time_ids),
        }
    if config.get("time_cond_proj_dim"):
        more["timestep_cond"] = torch.from_numpy(inputs("timestep_cond", 2, config["time_cond_proj_dim"]))
    sample = torch.from_numpy(inputs("sample", 2, height, width, config.get("in_channels", 4))).permute(0, 3, 1, 2)
    context = torch.from_numpy(inputs("context", 2, 5, 24))
    out = unet(sample, torch.tensor([901.0, 17.5]), context, **more).sample
    return out.permute(0, 2, 3, 1)


def run_vae(config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image `(1, H, W, 3)` of latents, and moments `(1, h, w, 2 C)` of an image."""
    vae = fill(AutoencoderKL(**config))
    channels = config.get("latent_channels", 4)
    latents = torch.from_numpy(inputs("latents", 1, 3, 4, channels)).permute(0, 3, 1, 2)
    image = torch.from_numpy(inputs("image", 1, 16, 24, 3)).permute(0, 3, 1, 2)
    moments = vae.encode(image).latent_dist
    both = torch.cat([moments.mean, moments.logvar], dim=1)
    return vae.decode(latents).sample.permute(0, 2, 3, 1), both.permute(0, 2, 3, 1)


def run_text(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the states of two texts."""
    config = dict(config)
    projection = config.pop("projection", False)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    model = kind(CLIPTextConfig(**config, attn_implementation="eager"))
    names = {name for name, _ in model.named_parameters()}
    fill(model, "" if any(name.startswith("text_model.") for name in names) else "text_model.")
    out = model(torch.tensor(TEXT_IDS), output_hidden_states=True)
    pooled = out.text_embeds if projection else out.pooler_output
    return {"hidden": torch.stack(out.hidden_states), "last": out.last_hidden_state, "pooled": pooled}


def run_checker(config: dict[str, Any]) -> np.ndarray:
    """Return whether each of eight images is flagged."""
    full = CLIPConfig(vision_config=config["vision_config"], text_config={"projection_dim": config["projection_dim"]},
                      projection_dim=config["projection_dim"])  # fmt: skip
    checker = StableDiffusionSafetyChecker(full)
    for name, tensor in [*checker.named_parameters(), *checker.named_buffers()]:
        if tensor.is_floating_point():  # transformers 5 has left out the inner `vision_model`
            old = name if name.startswith(("vision_model.vision_model.", "visual", "concept", "special")) else (
                f"vision_model.{name}")  # fmt: skip
            tensor.copy_(torch.from_numpy(draw(old, tensor.shape)))
    checker.concept_embeds_weights.copy_(torch.full((17,), 0.5))
    checker.special_care_embeds_weights.copy_(torch.full((3,), 0.2))
    side = config["vision_config"]["image_size"]
    pixels = torch.from_numpy(inputs("pixels", 8, side, side, 3)).permute(0, 3, 1, 2)
    return np.array(checker(clip_input=pixels, images=[np.zeros((1, 1, 3)) for _ in range(8)])[1])


if __name__ == "__main__":
    main()
