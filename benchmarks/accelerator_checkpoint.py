"""A checkpoint of random weights with the configs of a public model, in the diffusers layout: times need no others.

    python benchmarks/accelerator_checkpoint.py sd15 /tmp/random-sd15

Needs `pip install -e '.[worker]'`. JAX and PyTorch read the same files: 2 GB for sd15 and sd21, 7 GB for sdxl, in
bfloat16. The vocabulary is the shipped checkpoint's, so that no file has to be fetched. Images are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sdtpu_worker.diffusion.abstract_checkpoint import read_abstract
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.known_models import KNOWN_MODELS, KnownModel
from sdtpu_worker.models.layout import pytorch_shape

_BLOCK = 2**20
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=KNOWN_MODELS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_checkpoint(args.model, args.folder)


def write_checkpoint(model: str, folder: Path) -> None:
    """Write a checkpoint of random weights.

    Args:
        model: one of `KNOWN_MODELS`.
        folder: to write to; it is made.
    """
    source, shapes = KnownModel(model), read_abstract(model, jnp.bfloat16).params
    folder.mkdir(parents=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if source.is_xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", source.scheduler_config["_class_name"]],
    }
    if not source.is_xl:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for part, leaves in shapes.items():
        library, class_name = _CLASSES[part]
        index[part] = [library, class_name]
        is_text = library == "transformers"
        kind = {"architectures": [class_name]} if is_text else {"_class_name": class_name}
        _write_json(folder / part / "config.json", {**kind, **source.config(part)})
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        _write_tensors(folder / part / file, {name: pytorch_shape(name, leaf.shape) for name, leaf in leaves.items()})
    for name in ("tokenizer", "tokenizer_2") if source.is_xl else ("tokenizer",):
        shutil.copytree(find_folder("embedded", "main") / "tokenizer", folder / name)
        index[name] = ["transformers", "CLIPTokenizer"]
    _write_json(folder / "scheduler" / "scheduler_config.json", source.scheduler_config)
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def _write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file in bfloat16, one tensor at a time."""
    header, offset = dict[str, Any](), 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).standard_normal(_BLOCK).astype(np.float32)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            count = math.prod(shape)
            block = _values(name, shape, noise[: min(count, _BLOCK)]).astype(ml_dtypes.bfloat16).tobytes()
            whole, rest = divmod(2 * count, len(block))
            file.writelines([block] * whole)
            file.write(block[:rest])


def _values(name: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """Return values with which a signal keeps about its size: one for norms, zero for biases, else by the inputs."""
    if len(shape) == 1:
        return np.full_like(noise, float(name.endswith(".weight")))
    return noise * np.float32(0.5 if "embedding.weight" in name else math.prod(shape[1:]) ** -0.5)


if __name__ == "__main__":
    main()
