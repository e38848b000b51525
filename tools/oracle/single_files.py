"""Write what diffusers makes of original names: the golden map of `tests/device/test_single_file.py`.

    python -m tools.oracle.single_files

Every original name of a UNet and an autoencoder goes through diffusers' own conversion, which remembers it.
Needs torch and diffusers, see README.md. The names come from the published original configs: how many blocks there are.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from sdtpu_worker.diffusion import original_names
from tests.support.single_file_cases import UNETS, VAE

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden" / "original-names.json.gz"


def main() -> None:
    """Write one file: by model, today's names by original name."""
    defaults = {"class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None}
    golden = {name: unet_names({**defaults, **config}) for name, config in UNETS.items()}
    golden["vae"] = vae_names()
    GOLDEN.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))
    print({name: len(names) for name, names in golden.items()}, f"{GOLDEN.stat().st_size:,} bytes")


def unet_names(config: dict[str, Any]) -> dict[str, str]:
    """Return today's names of a UNet by original name."""
    with torch.device("meta"):
        names = list(UNet2DConditionModel(**config).state_dict())
    found = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": name for name in original_names.unet_names(names)}, config
    )
    return {original: today for today, original in found.items()}


def vae_names() -> dict[str, str]:
    """Return today's names of an autoencoder by original name."""
    with torch.device("meta"):
        names = list(AutoencoderKL(**VAE).state_dict())
    originals = [original_names.autoencoder_name(name, len(VAE["block_out_channels"])) for name in names]
    tensors = {f"first_stage_model.{name}": torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(originals)}
    found = convert_ldm_vae_checkpoint(tensors, VAE)
    return {originals[int(tensor.reshape(-1)[0])]: today for today, tensor in found.items()}


if __name__ == "__main__":
    main()
