"""Load a checkpoint: any folder or hub name in the diffusers layout.

Weights are Flax's msgpack or safetensors, see `weights.py`: no pickle, and no random initialisation first. Which family
a checkpoint is of, its parts say; every key of its configs is honoured or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.families.family import Family, Params
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from sdtpu_worker.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.diffusion.weights import find_weights, read_weights
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import (
    read_autoencoder_config,
    read_clip_text_config,
    read_safety_checker_config,
    read_unet_config,
)
from sdtpu_worker.models.network import Network
from sdtpu_worker.redaction import brief

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(str(resources.files("sdtpu_worker"))) / "checkpoint"
_FILES = ["*.json", "*/*.json", "tokenizer*/*.txt"]
# One format after the other, until every part has its weights: a hub often has the same weights in several.
_WEIGHTS = (["*/*.msgpack"], ["*/*model.safetensors", "*/*model-*-of-*.safetensors"], ["*/*fp16*.safetensors"])
_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
_XL_PARTS = {**_PARTS, "text_encoder_2": "CLIPTextModelWithProjection"}
_SERVED = "this worker runs Stable Diffusion 1.x, 2.x and XL checkpoints, and what is distilled from them"


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint does where a request asks for nothing else.

    Attributes:
        sampler: of its scheduler config.
        num_inference_steps: 50, and few for a distilled checkpoint.
        guidance_scale: 7.5, and less for a distilled checkpoint.
    """

    sampler: str
    num_inference_steps: int
    guidance_scale: float

    def fill(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with these values where it has none."""
        return request.with_defaults(self.sampler, self.num_inference_steps, self.guidance_scale)


@dataclass(frozen=True)
class LoadedSafetyChecker:
    """A safety checker.

    Attributes:
        network: the checker.
        params: its parameters as host arrays, float32.
        extractor: transformers' `CLIPImageProcessor`.
    """

    network: Network
    params: Mapping[str, Any]
    extractor: Any

    @property
    def crop(self) -> tuple[int, int]:
        """`(height, width)` of what the checker looks at, in pixels."""
        crop = self.extractor.crop_size
        return crop["height"], crop["width"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: a family without state, and parameters as host arrays beside it.

    Attributes:
        name: the `model` of results.
        dtype: of the parameters.
        family: the model.
        params: by part, then by tensor name; what a tick needs and no more.
        schedule: the noise schedule with the whole scheduler config.
        defaults: what a request gets that asks for nothing else.
        safety_checker: None for a checkpoint without one.
    """

    name: str
    dtype: Any
    family: Family
    params: Params
    schedule: NoiseSchedule
    defaults: Defaults
    safety_checker: LoadedSafetyChecker | None


def load_checkpoint(name: str, dtype: Any = jnp.float32, revision: str = "main") -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: a folder, a hub name like `owner/name`, or `embedded` for the shipped one.
        dtype: of the parameters and the computation, `jnp.float32` or `jnp.bfloat16`.
        revision: of a hub checkpoint.

    Raises:
        InvalidCheckpoint: the checkpoint is missing, half-written, not of a family that is served, has a config that is
            not honoured in every key, or weights in another format than msgpack or safetensors.
    """
    folder = _find_folder(name, revision)
    classes = _read_classes(folder)
    is_xl = "text_encoder_2" in classes
    _check_classes(folder, classes, _XL_PARTS if is_xl else _PARTS)
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    schedule = NoiseSchedule.from_config(scheduler_config)
    parts = _Parts(folder, dtype)
    family = parts.stable_diffusion_xl() if is_xl else parts.stable_diffusion()
    return Checkpoint(
        name=name,
        dtype=dtype,
        family=family,
        params=parts.params,
        schedule=schedule,
        defaults=Defaults(schedule.default_sampler, 50, 7.5),
        safety_checker=_load_safety_checker(folder) if "safety_checker" in classes else None,
    )


class _Parts:
    """Reads the parts of one checkpoint, and keeps the parameters.

    Args:
        folder: of the checkpoint.
        dtype: of parameters and computation.
    """

    def __init__(self, folder: Path, dtype: Any) -> None:
        self.folder, self.dtype = folder, dtype
        self.params: dict[str, dict[str, Any]] = {}
        self._configs: dict[str, Any] = {}

    def stable_diffusion(self) -> StableDiffusion:
        """Return the family with one text encoder."""
        text_encoder, tokenizer, config = self._text_encoder("text_encoder", "tokenizer", projection=False)
        common = self._latent_unet(force_upcast=False)
        self._check_context(common["unet_config"], config.hidden_size)
        del common["unet_config"]
        return StableDiffusion(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            **common,
        )

    def stable_diffusion_xl(self) -> StableDiffusionXL:
        """Return the family with two text encoders."""
        first, tokenizer, config = self._text_encoder("text_encoder", "tokenizer", projection=False)
        second, tokenizer_2, config_2 = self._text_encoder("text_encoder_2", "tokenizer_2", projection=True)
        common = self._latent_unet(force_upcast=True)
        width = config.hidden_size + config_2.hidden_size
        self._check_context(common["unet_config"], width)
        del common["unet_config"]
        index = _read_json(self.folder / "model_index.json", self.folder)
        return StableDiffusionXL(
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            width=width,
            layers=min(config.num_hidden_layers, config_2.num_hidden_layers),
            pooled_width=config_2.projection_dim,
            zeroes_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
            **common,
        )

    def _latent_unet(self, force_upcast: bool) -> dict[str, Any]:
        """Return what both families have, for their constructors, and the UNet's config.

        Args:
            force_upcast: whether the autoencoder's key of this name counts.
        """
        vae_config = self._config("vae", read_autoencoder_config)
        unet_config = self._config("unet", read_unet_config)
        if unet_config.in_channels != vae_config.latent_channels:
            raise InvalidCheckpoint(
                f"{self.folder}: the UNet takes {unet_config.in_channels} channels and the VAE has"
                f" {vae_config.latent_channels}; inpainting and image-conditioned checkpoints are not supported"
            )
        in_float32 = force_upcast and bool(self._configs["vae"].get("force_upcast"))
        decoder_dtype = jnp.float32 if in_float32 else self.dtype
        unet = self._network("unet", lambda: networks.unet(unet_config), self.dtype)
        decoder = self._decoder(vae_config, decoder_dtype)
        factor = 2 ** (len(vae_config.block_out_channels) - 1)
        height, width = _pair(unet_config.sample_size, self.folder)
        guidance_width = unet_config.time_cond_proj_dim or 0
        return {
            "unet": unet,
            "unet_config": unet_config,
            "decoder": decoder,
            "default_size": (height * factor, width * factor),
            "scale_factor": factor,
            "size_multiple": factor * 2 ** (len(unet_config.block_out_channels) - 1),
            "latent_channels": vae_config.latent_channels,
            "scaling_factor": vae_config.scaling_factor,
            "latent_mean": _numbers(vae_config.latents_mean),
            "latent_std": _numbers(vae_config.latents_std),
            "guidance_width": guidance_width,
            "is_guided": not guidance_width,
            "dtype": self.dtype,
            "decoder_dtype": decoder_dtype,
            "configs": self._configs,
        }

    def _decoder(self, config: Any, dtype: Any) -> Network:
        """Return the half of the autoencoder that is used; all tensors of both halves must be there."""
        decoder = self._make(lambda: networks.decoder(config), "vae")
        encoder = self._make(lambda: networks.encoder(config), "vae")
        tensors = read_weights(self.folder, "vae", {**decoder.shapes, **encoder.shapes}, dtype)
        self.params["vae"] = {name: tensors[name] for name in decoder.shapes}
        return decoder

    def _text_encoder(self, part: str, tokenizer: str, projection: bool) -> tuple[Network, PromptTokenizer, Any]:
        config = self._config(part, read_clip_text_config)
        network = self._network(part, lambda: networks.text_encoder(config, projection), self.dtype)
        return network, PromptTokenizer.from_folder(self.folder / tokenizer, config.max_position_embeddings), config

    def _config(self, part: str, read: Any) -> Any:
        """Return a part's config, and keep its JSON."""
        path = self.folder / part / "config.json"
        self._configs[part] = dict(_read_json(path, self.folder))
        try:
            return read(self._configs[part], str(path))
        except InvalidCheckpoint:
            raise
        except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
            raise InvalidCheckpoint(f"{path}: this config cannot be used: {type(exc).__name__}: {exc}") from exc

    def _network(self, part: str, make: Any, dtype: Any) -> Network:
        """Return a network, and keep its parameters."""
        network = self._make(make, part)
        self.params[part] = read_weights(self.folder, part, network.shapes, dtype)
        return network

    def _make(self, make: Any, part: str) -> Network:
        try:
            return make()
        except Exception as exc:  # as above, with as many ways as there are layers
            raise InvalidCheckpoint(
                f"{self.folder / part}: this config cannot be used: {type(exc).__name__}: {exc}"
            ) from exc

    def _check_context(self, unet_config: Any, width: int) -> None:
        widths = unet_config.cross_attention_dim
        if any(each != width for each in (widths if isinstance(widths, list | tuple) else [widths])):
            raise InvalidCheckpoint(
                f"{self.folder}: cross_attention_dim of the UNet must be {width}, what its text encoder makes,"
                f" got {brief(widths)}"
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
        parts = {*_XL_PARTS, "safety_checker"} & set(_read_classes(folder))
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


def _check_classes(folder: Path, classes: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Make sure that the parts are those of a checkpoint that this worker runs.

    Raises:
        InvalidCheckpoint: a part is missing, of another class, or one that this worker does not know.
    """
    for part, name in wanted.items():
        if classes.get(part) != name:
            raise InvalidCheckpoint(
                f"{folder}: model_index.json must name {name} as {part}, got {classes.get(part)}; {_SERVED}"
            )
    known = {*wanted, "scheduler", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor"}
    if more := sorted(set(classes) - known):
        raise InvalidCheckpoint(
            f"{folder}: model_index.json names {', '.join(more)} ({', '.join(classes[part] for part in more)}), which"
            f" would be left out; {_SERVED}"
        )


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


def _load_safety_checker(folder: Path) -> LoadedSafetyChecker:
    from transformers import CLIPImageProcessor

    try:
        path = folder / "safety_checker" / "config.json"
        network = networks.safety_checker(read_safety_checker_config(_read_json(path, folder), str(path)))
        extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
        raise InvalidCheckpoint(f"{folder}: the safety checker cannot be used: {type(exc).__name__}: {exc}") from exc
    return LoadedSafetyChecker(network, read_weights(folder, "safety_checker", network.shapes, jnp.float32), extractor)


def _pair(value: Any, folder: Path) -> tuple[int, int]:
    if value is None:
        raise InvalidCheckpoint(f"{folder}: sample_size of the UNet must be an integer, or two of them, got none")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))
