"""One original-layout file: its names are those that diffusers' conversion gives, and its parameters a folder's."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.original_names import (
    original_clip_names,
    original_openclip_names,
    original_unet_names,
    original_vae_names,
)
from sdtpu_worker.diffusion.loading.part_files import open_part
from sdtpu_worker.diffusion.loading.single_file import open_single_file
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "names.json.gz").read_bytes()))
PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
TENSORS = {"sd1": (686, 248, 196, 0), "sd2": (686, 248, 372, 0), "sdxl": (1680, 248, 196, 517)}


def rule_of(architecture: str, part: str) -> Any:
    if part in ("unet", "vae"):
        return {"unet": original_unet_names, "vae": original_vae_names}[part]
    return original_clip_names if PREFIXES[architecture][part].endswith("transformer.") else original_openclip_names


def prefix_of(architecture: str, part: str) -> str:
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}.get(part) or PREFIXES[architecture][part]


@pytest.mark.parametrize("architecture", GOLDEN)
def test_every_name_is_the_one_that_diffusers_converts_from(architecture):
    for part, tensors in GOLDEN[architecture].items():
        names = rule_of(architecture, part)(tensors)
        assert {name: [original.name, original.third or 0] for name, original in names.items()} == {
            name: [stored, third] for name, (stored, third, _shape) in tensors.items()
        }


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_the_configs_make_the_models_that_are_known(architecture):
    """The golden shapes are those of PyTorch's models, made from our configs."""
    parts = GOLDEN[architecture]
    assert sum(int(np.prod(shape)) for *_names, shape in parts["unet"].values()) == PARAMETERS[architecture]
    counts = tuple(len(parts.get(part, ())) for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
    assert counts == TENSORS[architecture]


def tiny_params(architecture: str, channels: int = 4) -> dict[str, dict[str, np.ndarray]]:
    """Return every tensor of an architecture under diffusers' names as PyTorch stores it, but tiny."""
    rng = np.random.default_rng(len(architecture))
    sizes = {1: (2,), 2: (2, 2), 4: (2, 3, 1, 1)}
    parts = {}
    for part, tensors in GOLDEN[architecture].items():
        parts[part] = {
            name: rng.normal(size=sizes[len(shape)]).astype(np.float16) for name, (*_names, shape) in tensors.items()
        }
    parts["unet"]["conv_in.weight"] = rng.normal(size=(2, channels, 3, 3)).astype(np.float16)
    return parts


def as_original(architecture: str, parts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the tensors as one original file has them, after diffusers' conversion read backwards."""
    stored: dict[str, np.ndarray] = {}
    for part, tensors in parts.items():
        prefix = prefix_of(architecture, part)
        for name, value in tensors.items():
            original, third, _shape = GOLDEN[architecture][part][name]
            key = prefix + original
            if "in_proj_" in original:
                whole = stored.setdefault(key, np.zeros((3 * value.shape[0], *value.shape[1:]), value.dtype))
                whole[third * value.shape[0] : (third + 1) * value.shape[0]] = value
            elif name == "text_projection.weight":
                stored[key] = np.ascontiguousarray(value.T)
            elif part == "vae" and re.search(r"\.(q|k|v|proj_out)\.weight$", original):
                stored[key] = value[:, :, None, None]  # the original attention is of 1×1 convolutions
            else:
                stored[key] = value
    return stored


def shapes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: from_pytorch(name, value).shape for name, value in tensors.items()}


EXTRAS = {
    "sd1": ["model_ema.decay", "model_ema.diffusion_modelout0weight", "betas", "sqrt_alphas_cumprod",
            "cond_stage_model.transformer.text_model.embeddings.position_ids", "first_stage_model.loss.logvar"],
    "sd2": ["cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection",
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight", "alphas_cumprod"],
    "sdxl": ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "denoiser.sigmas",
             "conditioner.embedders.1.model.logit_scale", "model_ema.num_updates"],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("architecture", GOLDEN)
def test_a_folder_and_a_single_file_give_the_same_parameters(architecture, dtype, tmp_path):
    parts = tiny_params(architecture)
    extras = {name: np.zeros(1, np.float32) for name in EXTRAS[architecture]}
    save_file(as_original(architecture, parts) | extras, tmp_path / "one.safetensors")
    single = open_single_file(tmp_path / "one.safetensors")
    assert (single.architecture, single.in_channels, set(single.parts)) == (architecture, 4, set(parts))
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(tensors, tmp_path / part / f"{stem}.safetensors")
        shapes = shapes_of(tensors)
        one = read_weights(single.part(part, shapes), shapes, dtype)
        other = read_weights(open_part(tmp_path, part), shapes, dtype)
        assert list(one) == list(other) == list(shapes)
        assert all(one[name].tobytes() == other[name].tobytes() for name in shapes)


@pytest.mark.parametrize("channels", [8, 9])
def test_the_input_channels_are_the_files(tmp_path, channels):
    save_file(as_original("sd1", tiny_params("sd1", channels)), tmp_path / "a.safetensors")
    single = open_single_file(tmp_path / "a.safetensors")
    assert single.in_channels == channels


def test_the_oldest_text_encoders_lack_a_prefix(tmp_path):
    parts = tiny_params("sd1")
    stored = {name.replace("transformer.text_model.", "transformer."): value
              for name, value in as_original("sd1", parts).items()}  # fmt: skip
    save_file(stored, tmp_path / "a.safetensors")
    shapes = shapes_of(parts["text_encoder"])
    read_weights(open_single_file(tmp_path / "a.safetensors").part("text_encoder", shapes), shapes, np.float32)


def test_marks_of_the_training_are_found(tmp_path):
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    for given in ({}, marks):
        save_file(as_original("sdxl", tiny_params("sdxl")) | given, tmp_path / "a.safetensors")
        assert open_single_file(tmp_path / "a.safetensors").marks == set(given)


def test_a_refiner_is_refused_by_name(tmp_path):
    stored = {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": np.zeros((4, 1280)),
              "conditioner.embedders.0.model.ln_final.weight": np.zeros(4)}  # fmt: skip
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(InvalidCheckpoint, match="looks like Stable Diffusion XL refiner, and it is of no kind that is"):
        open_single_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("first_stage_model.", {}, r"Stable Diffusion 1.x, and it lacks vae \(first_stage_model\.\*\)"),
        ("cond_stage_model.", {}, r"lacks text_encoder \(cond_stage_model\.transformer\.\*\)"),
        ("model.diffusion_model.", {}, r"not a whole checkpoint in the original layout.*text encoder"),
        (
            "",
            {"control_model.time_embed.0.weight": (2, 2)},
            r"to no part of Stable Diffusion 1.x: control_model",
        ),
        ("", {"edm_mean": (4,)}, r"belong to no part of Stable Diffusion 1.x: edm_mean"),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_says_what_it_is(tmp_path, remove, add, message):
    stored = as_original("sd1", tiny_params("sd1"))
    stored["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = np.zeros((2, 768))
    stored = {name: value for name, value in stored.items() if not (remove and name.startswith(remove))}
    save_file(stored | {name: np.zeros(shape, np.float16) for name, shape in add.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidCheckpoint, match=message):
        open_single_file(tmp_path / "a.safetensors")


def test_a_tensor_that_is_missing_or_too_many_is_named(tmp_path):
    parts = tiny_params("sd1")
    stored = as_original("sd1", parts)
    del stored["model.diffusion_model.out.2.bias"]
    stored["model.diffusion_model.scale_weight"] = np.zeros(1, np.float16)
    save_file(stored, tmp_path / "a.safetensors")
    shapes = shapes_of(parts["unet"])
    with pytest.raises(InvalidCheckpoint, match=r"a\.safetensors, unet: .*\(missing: conv_out\.bias; unexpected:"
                       r" model\.diffusion_model\.scale_weight\)"):  # fmt: skip
        read_weights(open_single_file(tmp_path / "a.safetensors").part("unet", shapes), shapes, np.float32)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_a_pickle_is_refused(tmp_path, suffix):
    with pytest.raises(InvalidCheckpoint, match=r"are pickles, .*from_single_file"):
        open_single_file(tmp_path / f"sd.{suffix}")
