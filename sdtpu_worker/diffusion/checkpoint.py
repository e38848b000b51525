"""Load a checkpoint: any folder or hub name in the diffusers layout.

Weights are Flax's msgpack or safetensors, see `weights.py`: no pickle, and no random initialisation first. Which family
a checkpoint is of, its parts say; every key of its configs is honoured or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sdtpu_worker.contract.request import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, GenerationRequest
from sdtpu_worker.diffusion.checkpoint_folder import check_classes, find_folder, read_classes, read_json
from sdtpu_worker.diffusion.families.family import Family, Params
from sdtpu_worker.diffusion.parts import Parts
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.diffusion.weights import read_weights
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_safety_checker_config
from sdtpu_worker.models.network import Network

_FEW_STEPS, _GUIDANCE_OF_LCM = 4, 8.5


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


def load_checkpoint(name: str, dtype: Any = jnp.float32, revision: str = "main", guidance: str = "auto") -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: a folder, a hub name like `owner/name`, or `embedded` for the shipped one.
        dtype: of the parameters and the computation, `jnp.float32` or `jnp.bfloat16`.
        revision: of a hub checkpoint.
        guidance: `on`: every job has a row for its negative prompt; `off`: none has; `auto`: as the checkpoint needs.

    Raises:
        InvalidCheckpoint: the checkpoint is missing, half-written, not of a family that is served, has a config that is
            not honoured in every key, or weights in another format than msgpack or safetensors.
        ConfigurationError: `guidance` is `on` for a checkpoint that is told the guidance scale instead.
    """
    folder = find_folder(name, revision)
    classes = read_classes(folder)
    check_classes(folder, classes)
    is_xl = "text_encoder_2" in classes
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json", folder)
    # PyTorch's pipelines for 1.x and 2.x mend outdated configs; the one for XL does not.
    schedule = NoiseSchedule.from_config(scheduler_config, corrects_outdated=not is_xl)
    parts = Parts(folder, dtype)
    defaults = _defaults(schedule, parts.guidance_width)
    if guidance == "on" and parts.guidance_width:
        raise ConfigurationError(
            f"sdtpu_guidance must be auto or off for {name}: its UNet is told the guidance scale (time_cond_proj_dim),"
            " and makes one prediction of it, got on"
        )
    is_guided = guidance == "on" or (guidance == "auto" and not parts.guidance_width and defaults.guidance_scale > 1)
    return Checkpoint(
        name=name,
        dtype=dtype,
        family=parts.family(is_guided, is_xl),
        params=parts.params,
        schedule=schedule,
        defaults=defaults,
        safety_checker=_load_safety_checker(folder) if "safety_checker" in classes else None,
    )


def _defaults(schedule: NoiseSchedule, guidance_width: int) -> Defaults:
    """Return what a checkpoint does by default; a distilled one is known by the scheduler that it comes with."""
    options, sampler = schedule.options, schedule.default_sampler
    is_turbo = (
        sampler in ("euler", "euler_ancestral")
        and options.get("timestep_spacing") == "trailing"
        and options.get("prediction_type") == "epsilon"
        and not options.get("rescale_betas_zero_snr")
    )
    if guidance_width:
        return Defaults(sampler, _FEW_STEPS, _GUIDANCE_OF_LCM)
    if is_turbo or sampler in ("lcm", "tcd"):
        return Defaults(sampler, _FEW_STEPS, 1.0)
    return Defaults(sampler, DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE)


def _load_safety_checker(folder: Path) -> LoadedSafetyChecker:
    from transformers import CLIPImageProcessor

    try:
        path = folder / "safety_checker" / "config.json"
        network = networks.safety_checker(read_safety_checker_config(read_json(path, folder), str(path)))
        extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
        raise InvalidCheckpoint(f"{folder}: the safety checker cannot be used: {type(exc).__name__}: {exc}") from exc
    return LoadedSafetyChecker(network, read_weights(folder, "safety_checker", network.shapes, jnp.float32), extractor)
