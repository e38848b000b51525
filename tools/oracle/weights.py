"""Record how diffusers renames original-layout files: `tests/device/golden/names.json.gz`.

Every original name that our rules give is put through diffusers' own conversion as a small tagged tensor; what comes
out says where it went. The models' names and shapes are those of the PyTorch models, built without memory.

    python -m tools.oracle.weights      # 30 s, see README.md for the environment
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtpu_worker.diffusion.loading import architectures, original_names
from tools.oracle.names import name_in_files

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden" / "names.json.gz"


def torch_shapes(part: str, config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the names and shapes of PyTorch's model; text encoders with the prefix that transformers 5 dropped."""
    with torch.device("meta"):
        if part == "unet":
            model: Any = UNet2DConditionModel.from_config(config)
        elif part == "vae":
            model = AutoencoderKL.from_config(config)
        else:
            kind = CLIPTextModelWithProjection if "WithProjection" in config["architectures"][0] else CLIPTextModel
            model = kind(CLIPTextConfig(**config))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if "position_ids" not in name}
    return {name_in_files(name) if part.startswith("text_encoder") else name: shape for name, shape in shapes.items()}


def converted(part: str, config: dict[str, Any], originals: dict[str, Any], shapes: dict[str, list[int]]) -> Any:
    """Return diffusers' names of the tagged originals, with tags as values."""
    tags = {name: number for number, name in enumerate(dict.fromkeys(original.name for original in originals.values()))}
    tensors = {}
    for name, original in originals.items():
        rank = len(shapes[name])
        rows = torch.arange(6.0) if original.third is not None else torch.zeros(2)
        tensors[original.name] = (1000 * tags[original.name] + rows.reshape(-1, *[1] * (rank - 1))).expand(
            -1, *[2] * (rank - 1)
        )
    if part == "unet":
        prefixed = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
        result = single_file_utils.convert_ldm_unet_checkpoint(prefixed, config)
    elif part == "vae":
        prefixed = {f"first_stage_model.{name}": value for name, value in tensors.items()}
        result = single_file_utils.convert_ldm_vae_checkpoint(prefixed, config)
    elif config["hidden_act"] == "quick_gelu":
        prefixed = {f"cond_stage_model.transformer.{name}": value for name, value in tensors.items()}
        result = single_file_utils.convert_ldm_clip_checkpoint(prefixed)
    else:
        sizes = type("Model", (), {"config": type("Config", (), {"hidden_size": 2})})
        # Another prefix, or diffusers would drop the projection, which Stable Diffusion 2.x does not use.
        prefixed = {f"other.{name}": value for name, value in tensors.items()}
        result = single_file_utils.convert_open_clip_checkpoint(sizes, prefixed, "other.")
    names = list(tags)
    return {name: [names[int(value.flatten()[0]) // 1000], int(value.flatten()[0]) % 1000 // 2]
            for name, value in result.items()}  # fmt: skip


def main() -> None:
    """Write the golden file."""
    golden: dict[str, Any] = {}
    for architecture, unet in architectures.UNETS.items():
        configs = {"unet": {**unet, "in_channels": 4}, "vae": architectures.VAES[architecture]}
        configs |= architectures.TEXT_ENCODERS[architecture]
        for part, config in configs.items():
            shapes = torch_shapes(part, config)
            rule = {"unet": original_names.original_unet_names, "vae": original_names.original_vae_names}.get(part)
            if rule is None:
                clip_l = config["hidden_act"] == "quick_gelu"
                rule = original_names.original_clip_names if clip_l else original_names.original_openclip_names
            renamed = converted(part, config, rule(shapes), shapes)
            assert renamed.keys() == shapes.keys(), sorted(renamed.keys() ^ shapes.keys())[:9]
            golden.setdefault(architecture, {})[part] = {name: [*renamed[name], shapes[name]] for name in shapes}
            print(architecture, part, len(shapes))
    GOLDEN.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))


if __name__ == "__main__":
    main()
