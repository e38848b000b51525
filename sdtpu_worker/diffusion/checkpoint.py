"""Load a Stable Diffusion checkpoint: any folder or hub name in the diffusers layout.

Weights are Flax's msgpack or safetensors, see `weights.py`: no pickle, and no random initialisation first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from transformers import CLIPTextConfig, FlaxCLIPTextModel

from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.diffusion.weights import Params, find_weights, read_weights
from sdtpu_worker.errors import InvalidCheckpoint

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(str(resources.files("sdtpu_worker"))) / "checkpoint"
_FILES = ["*.json", "*/*.json", "tokenizer/*.txt"]
# One format after the other, until every part has its weights: a hub often has the same weights in several.
_WEIGHTS = (["*/*.msgpack"], ["*/*model.safetensors", "*/*model-*-of-*.safetensors"], ["*/*fp16*.safetensors"])
_UNET_CLASS, _VAE_CLASS, _TEXT_CLASS = "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: modules without state, and parameters as host arrays beside them.

    Attributes:
        name: the `model` of results.
        params: `{"text_encoder", "unet", "vae"}` and, with a checker, `"safety_checker"`; float leaves in `dtype`.
        schedule: the noise schedule with the whole scheduler config.
        default_sampler: the sampler that the scheduler config asks for.
        vae_scale_factor: pixels per latent, along one side.
        default_size: `(height, width)` in pixels.
    """

    name: str
    dtype: Any
    tokenizer: PromptTokenizer
    text_encoder: FlaxCLIPTextModel
    unet: FlaxUNet2DConditionModel
    vae: FlaxAutoencoderKL
    params: Params
    schedule: NoiseSchedule
    default_sampler: str
    vae_scale_factor: int
    default_size: tuple[int, int]
    safety_checker: Any | None
    feature_extractor: Any | None

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.unet.config.in_channels


def load_checkpoint(name: str, dtype: Any = jnp.float32, revision: str = "main") -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: a folder, a hub name like `owner/name`, or `embedded` for the shipped one.
        dtype: of the parameters and the computation, `jnp.float32` or `jnp.bfloat16`.
        revision: of a hub checkpoint.

    Raises:
        InvalidCheckpoint: the checkpoint is missing, half-written, or not of Stable Diffusion with msgpack or
            safetensors weights.
    """
    folder = _find_folder(name, revision)
    classes = _read_classes(folder)
    _check_classes(folder, classes)
    unet_config = _read_json(folder / "unet" / "config.json", folder)
    vae_config = _read_json(folder / "vae" / "config.json", folder)
    text_config = _read_json(folder / "text_encoder" / "config.json", folder)
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    try:
        unet = FlaxUNet2DConditionModel.from_config(unet_config, dtype=dtype)
        vae = FlaxAutoencoderKL.from_config(vae_config, dtype=dtype)
        text_encoder = FlaxCLIPTextModel(CLIPTextConfig.from_dict(text_config), dtype=dtype, _do_init=False)
        schedule, vae_scale_factor = (
            NoiseSchedule.from_config(scheduler_config, corrects_outdated=True),
            2 ** (len(vae.config.block_out_channels) - 1),
        )
        side = _pair(unet.config.sample_size)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
        raise InvalidCheckpoint(f"{folder}: a config cannot be used: {type(exc).__name__}: {exc}") from exc
    tokenizer = PromptTokenizer.from_folder(folder / "tokenizer", text_encoder.config.max_position_embeddings)
    if unet.config.in_channels != vae.config.latent_channels:
        raise InvalidCheckpoint(
            f"{folder}: the UNet takes {unet.config.in_channels} channels and the VAE has"
            f" {vae.config.latent_channels}; inpainting and image-conditioned checkpoints are not supported"
        )
    params = {
        "text_encoder": read_weights(folder, "text_encoder", text_encoder.params_shape_tree, dtype),
        "unet": read_weights(folder, "unet", _shapes(unet, folder), dtype),
        "vae": read_weights(folder, "vae", _shapes(vae, folder), dtype),
    }
    safety_checker = feature_extractor = None
    if "safety_checker" in classes:
        safety_checker, feature_extractor, params["safety_checker"] = _load_safety_checker(folder)
    return Checkpoint(
        name=name,
        dtype=dtype,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        params=params,
        schedule=schedule,
        default_sampler=schedule.default_sampler,
        vae_scale_factor=vae_scale_factor,
        default_size=(side[0] * vae_scale_factor, side[1] * vae_scale_factor),
        safety_checker=safety_checker,
        feature_extractor=feature_extractor,
    )


def _find_folder(name: str, revision: str) -> Path:
    if name == EMBEDDED:
        return _EMBEDDED_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InvalidCheckpoint(
            f"sdtpu_model must be a folder in the diffusers layout, got the file {name!r}; convert it where it is"
            " trusted, with diffusers' `from_single_file` and `save_pretrained(safe_serialization=True)`"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.exists():
        raise InvalidCheckpoint(
            f"sdtpu_model must be a folder, a hub name like 'owner/name', or '{EMBEDDED}'; there is no folder {name!r}"
        )
    try:
        return _download(name, revision)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"no folder {name!r} here, and the hub did not give a checkpoint of that name at revision"
            f" {revision!r} ({type(exc).__name__}: {exc}); check sdtpu_model and sdtpu_revision"
        ) from exc


def _download(name: str, revision: str) -> Path:
    """Download a hub checkpoint, each part in one format; a pickle is never downloaded."""
    from huggingface_hub import snapshot_download

    for patterns in _WEIGHTS:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *patterns]))
        parts = {"unet", "vae", "text_encoder", "safety_checker"} & set(_read_classes(folder))
        if all(find_weights(folder, part) for part in parts):
            break
    return folder


def _read_classes(folder: Path) -> dict[str, str]:
    """Return by part the class that `model_index.json` names for it."""
    index = _read_json(folder / "model_index.json", folder)
    return {
        part: str(entry[1]).removeprefix("Flax")
        for part, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1]
    }


def _check_classes(folder: Path, classes: Mapping[str, str]) -> None:
    """Make sure that the parts are those of a checkpoint that this worker runs.

    Raises:
        InvalidCheckpoint: a part is missing or of another class.
    """
    for part, wanted in (("unet", _UNET_CLASS), ("vae", _VAE_CLASS), ("text_encoder", _TEXT_CLASS)):
        if classes.get(part) != wanted:
            raise InvalidCheckpoint(
                f"{folder}: model_index.json must name {wanted} as {part}, got {classes.get(part)};"
                " this worker runs Stable Diffusion 1.x and 2.x checkpoints"
            )


def _shapes(module: FlaxUNet2DConditionModel | FlaxAutoencoderKL, folder: Path) -> Params:
    """Return the tree of a module's parameters with their shapes, without computing them."""
    try:
        return jax.eval_shape(module.init_weights, jax.random.key(0))
    except Exception as exc:  # a config that makes no model fails in as many ways as there are layers
        raise InvalidCheckpoint(f"{folder}: a config cannot be used: {type(exc).__name__}: {exc}") from exc


def _read_json(path: Path, folder: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder} is not a checkpoint in the diffusers layout: {path.relative_to(folder)} is missing"
        ) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _load_safety_checker(folder: Path) -> tuple[Any, Any, Params]:
    from transformers import CLIPConfig, CLIPImageProcessor

    try:
        config = CLIPConfig.from_dict(dict(_read_json(folder / "safety_checker" / "config.json", folder)))
        side = config.vision_config.image_size
        checker = safety_checker_class()(config, input_shape=(1, side, side, 3), _do_init=False)
        extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # as above
        raise InvalidCheckpoint(f"{folder}: the safety checker cannot be used: {type(exc).__name__}: {exc}") from exc
    return checker, extractor, read_weights(folder, "safety_checker", checker.params_shape_tree, jnp.float32)


def safety_checker_class() -> Any:
    """Return diffusers' Flax safety checker with our cosine: its own calls `jnp.clip(a_min=…)`, which JAX dropped."""
    from diffusers.pipelines.stable_diffusion import safety_checker_flax

    safety_checker_flax.jax_cosine_distance = _cosine_similarity
    return safety_checker_flax.FlaxStableDiffusionSafetyChecker


def _cosine_similarity(a: Any, b: Any, eps: float = 1e-12) -> Any:
    """Return the cosine of every row of `a` with every row of `b`."""
    a = a / jnp.maximum(jnp.linalg.norm(a, axis=1, keepdims=True), eps)
    b = b / jnp.maximum(jnp.linalg.norm(b, axis=1, keepdims=True), eps)
    return a @ b.T


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
