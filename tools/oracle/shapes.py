"""Write down the names and shapes of real checkpoints' tensors, as PyTorch's models have them.

Run with the oracle's virtual environment (README.md beside this file). Nothing is downloaded and no weights are made:
the models stand on torch's device "meta". Takes about a minute and writes `tests/device/golden/known-checkpoints.json`,
a number of parameters and a digest for each part:

    python -m tools.oracle.shapes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.device import known_checkpoints as known
from tests.device import known_parts
from tests.support.random_weights import digest
from tools.oracle.names import name_in_files

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden" / "known-checkpoints.json"


def main() -> None:
    """Write the file."""
    with torch.device("meta"):
        parts = {name: _describe(_unet(config)) for name, config in known.UNETS.items()}
        parts |= {name: _describe(_text_encoder(config)) for name, config in known_parts.TEXT_ENCODERS.items()}
        parts |= {name: _describe(_autoencoder(config)) for name, config in known_parts.VAES.items()}
        parts["safety checker"] = _describe(StableDiffusionSafetyChecker(CLIPConfig(**known_parts.SAFETY_CHECKER)))
    GOLDEN.write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")
    for name, part in parts.items():
        print(f"{part['parameters']:>13,} {name}")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _unet(config: dict[str, Any]) -> torch.nn.Module:
    return UNet2DConditionModel(**_settings(config))


def _autoencoder(config: dict[str, Any]) -> torch.nn.Module:
    if config["_class_name"] == "AutoencoderKL":
        return AutoencoderKL(**_settings(config))
    settings = {key: value for key, value in _settings(config).items() if key != "block_out_channels"}
    return AutoencoderTiny(**settings)


def _text_encoder(config: dict[str, Any]) -> torch.nn.Module:
    projects = config["architectures"] == ["CLIPTextModelWithProjection"]
    kind: Any = CLIPTextModelWithProjection if projects else CLIPTextModel
    return kind(CLIPTextConfig(**config))


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    shapes = {
        name_in_files(name): tuple(tensor.shape)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.endswith("position_ids")
    }
    return {"parameters": sum(torch.Size(shape).numel() for shape in shapes.values()), "digest": digest(shapes)}


if __name__ == "__main__":
    main()
