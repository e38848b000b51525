"""Load a Stable Diffusion checkpoint: any folder or hub name in the diffusers layout with Flax weights.

Weights are read with msgpack alone: no pickle, and no random initialisation first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from flax.serialization import msgpack_restore
from transformers import CLIPTextConfig, CLIPTokenizer, FlaxCLIPTextModel

from sdtpu_worker.diffusion.samplers import NoiseSchedule, default_sampler
from sdtpu_worker.errors import InvalidCheckpoint

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
_FILES = ["*.json", "*/*.json", "*/*.msgpack", "tokenizer/*"]
_UNET_CLASS, _VAE_CLASS, _TEXT_CLASS = "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"

Params = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: modules without state, and parameters as host arrays beside them.

    Attributes:
        name: what the results report as `model`.
        params: `{"text_encoder", "unet", "vae"}` and, with a checker, `"safety_checker"`; float leaves in `dtype`.
        schedule: the noise schedule with the whole scheduler config.
        default_sampler: the sampler that the scheduler config asks for.
        vae_scale_factor: pixels per latent, along one side.
        default_size: `(height, width)` in pixels.
    """

    name: str
    dtype: Any
    tokenizer: CLIPTokenizer
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
        InvalidCheckpoint: it is missing, half-written, or not a Stable Diffusion checkpoint with Flax weights.
    """
    folder = _find_folder(name, revision)
    index = _read_json(folder / "model_index.json", folder)
    classes = {part: str((entry or [None, None])[1]).removeprefix("Flax")
               for part, entry in index.items() if isinstance(entry, list)}  # fmt: skip
    for part, wanted in (("unet", _UNET_CLASS), ("vae", _VAE_CLASS), ("text_encoder", _TEXT_CLASS)):
        if classes.get(part) != wanted:
            raise InvalidCheckpoint(
                f"{folder}: model_index.json must name {wanted} as {part}, got {classes.get(part)};"
                " this worker runs Stable Diffusion 1.x and 2.x checkpoints"
            )
    unet_config = _read_json(folder / "unet" / "config.json", folder)
    vae_config = _read_json(folder / "vae" / "config.json", folder)
    text_config = _read_json(folder / "text_encoder" / "config.json", folder)
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    try:
        unet = FlaxUNet2DConditionModel.from_config(unet_config, dtype=dtype)
        vae = FlaxAutoencoderKL.from_config(vae_config, dtype=dtype)
        text_encoder = FlaxCLIPTextModel(CLIPTextConfig.from_dict(text_config), dtype=dtype, _do_init=False)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (TypeError, ValueError, OSError, KeyError) as exc:
        raise InvalidCheckpoint(f"{folder}: a config or the tokenizer cannot be used: {exc}") from exc
    if unet.config.in_channels != vae.config.latent_channels:
        raise InvalidCheckpoint(
            f"{folder}: the UNet takes {unet.config.in_channels} channels and the VAE has"
            f" {vae.config.latent_channels}; inpainting and image-conditioned checkpoints are not supported"
        )
    params = {
        "text_encoder": _read_weights(folder, "text_encoder", "flax_model.msgpack", dtype),
        "unet": _read_weights(folder, "unet", "diffusion_flax_model.msgpack", dtype),
        "vae": _read_weights(folder, "vae", "diffusion_flax_model.msgpack", dtype),
    }
    safety_checker = feature_extractor = None
    if classes.get("safety_checker") not in (None, "None"):
        safety_checker, feature_extractor, params["safety_checker"] = _load_safety_checker(folder)
    vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = _pair(unet.config.sample_size)
    return Checkpoint(
        name=name,
        dtype=dtype,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        params=params,
        schedule=NoiseSchedule.from_config(scheduler_config),
        default_sampler=default_sampler(scheduler_config),
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
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.exists():
        raise InvalidCheckpoint(
            f"sdtpu_model must be a folder, a hub name like 'owner/name', or '{EMBEDDED}'; there is no folder {name!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"no folder {name!r} here, and the hub did not give a checkpoint of that name at revision"
            f" {revision!r} ({type(exc).__name__}: {exc}); check sdtpu_model and sdtpu_revision"
        ) from exc


def _read_json(path: Path, folder: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder} is not a checkpoint in the diffusers layout: {path.relative_to(folder)} is missing"
        ) from None
    except (OSError, ValueError) as exc:
        raise InvalidCheckpoint(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _read_weights(folder: Path, part: str, file_name: str, dtype: Any) -> Params:
    path = folder / part / file_name
    if not path.is_file():
        others = sorted(
            p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".safetensors", ".ckpt", ".msgpack")
        )
        raise InvalidCheckpoint(
            f"{folder}: {part}/{file_name} is missing (found {', '.join(others) or 'no weights'}); this worker reads"
            " Flax weights: convert them with diffusers' and transformers' `from_pt=True` and `save_pretrained`"
        )
    try:
        params = msgpack_restore(path.read_bytes())
    except Exception as exc:  # msgpack raises a different error for each way in which a file can be broken
        raise InvalidCheckpoint(
            f"{path} is not a complete Flax weights file ({path.stat().st_size:,} bytes):"
            f" {type(exc).__name__}: {exc}; download or convert it again"
        ) from exc
    if not isinstance(params, dict) or not params:
        raise InvalidCheckpoint(f"{path} holds no parameters")
    return _cast(params, dtype)


def _cast(tree: Any, dtype: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _cast(branch, dtype) for name, branch in tree.items()}
    array = np.asarray(tree)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _load_safety_checker(folder: Path) -> tuple[Any, Any, Params]:
    from transformers import CLIPConfig, CLIPImageProcessor

    try:
        config = CLIPConfig.from_dict(dict(_read_json(folder / "safety_checker" / "config.json", folder)))
        side = config.vision_config.image_size
        checker = safety_checker_class()(config, input_shape=(1, side, side, 3), _do_init=False)
        extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    except (TypeError, ValueError, OSError, KeyError) as exc:
        raise InvalidCheckpoint(f"{folder}: the safety checker cannot be used: {exc}") from exc
    return checker, extractor, _read_weights(folder, "safety_checker", "flax_model.msgpack", jnp.float32)


def safety_checker_class() -> Any:
    """Return diffusers' Flax safety checker, mended: its own cosine calls `jnp.clip(a_min=...)`, which JAX dropped."""
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
