"""Load a checkpoint: any folder or hub name in the diffusers layout, or one file in the original layout.

Its configs are enough to trace programs. So its weights can be read meanwhile, in a thread: see `LoadingCheckpoint`.

Weights are safetensors or Flax's msgpack, see `loading/`: no pickle, and no random initialisation first. Which family a
checkpoint is of, its parts say; every key of its configs is honoured or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.contract.request import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, GenerationRequest
from sdtpu_worker.diffusion.adapters import AdapterLayout
from sdtpu_worker.diffusion.checkpoint_file import CheckpointFile
from sdtpu_worker.diffusion.checkpoint_folder import Folder, find_folder
from sdtpu_worker.diffusion.families.family import Family, Params
from sdtpu_worker.diffusion.loading.adapters import AdapterFiles
from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.lora import MergedLora
from sdtpu_worker.diffusion.parts import Parts
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_safety_checker_config
from sdtpu_worker.models.network import Network

_FEW_STEPS, _GUIDANCE_OF_LCM = 4, 8.5
_F32 = jnp.float32


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
        config: of the network, as JSON.
        params: its parameters as host arrays, float32; or their shapes.
        extractor: transformers' `CLIPImageProcessor`.
    """

    network: Network
    config: Mapping[str, Any]
    params: Mapping[str, Any]
    extractor: Any

    @property
    def crop(self) -> tuple[int, int]:
        """`(height, width)` of what the checker looks at, in pixels."""
        crop = self.extractor.crop_size
        return crop["height"], crop["width"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: a family without state, and parameters beside it, as host arrays or only as their shapes.

    Attributes:
        name: the `model` of results.
        dtype: of the parameters.
        family: the model.
        params: by part, then by tensor name; what a tick needs and no more.
        schedule: the noise schedule with the whole scheduler config.
        defaults: what a request gets that asks for nothing else.
        safety_checker: None for a checkpoint without one.
        loras: what was merged into the parameters.
        adapters: the LoRAs that single jobs can name; None for a worker without.
        embeddings: the words with vectors of their own, each with a digest of them.
        prompt_windows: how many windows a job's prompt may have.
    """

    name: str
    dtype: Any
    family: Family
    params: Params
    schedule: NoiseSchedule
    defaults: Defaults
    safety_checker: LoadedSafetyChecker | None
    loras: tuple[MergedLora, ...] = ()
    adapters: AdapterFiles | None = None
    embeddings: tuple[tuple[str, str], ...] = ()
    prompt_windows: int = 1

    @property
    def outline(self) -> Checkpoint:
        """All that programs are traced from: this checkpoint, where nothing is read meanwhile."""
        return self

    def wait(self) -> Checkpoint:
        """Return this checkpoint: it has its weights."""
        return self

    def check(self) -> None:
        """Return at once: nothing can fail any more."""


@dataclass(frozen=True)
class LoadOptions:
    """What the settings say about loading besides the checkpoint's name.

    Attributes:
        revision: of a hub checkpoint.
        guidance: `on`: every job has a row for its negative prompt; `off`: none has; `auto`: as the checkpoint needs.
        tokenizer: folder with CLIP's vocabulary, or of a checkpoint that has it, for a checkpoint in one file.
        prediction_type: `epsilon` or `v_prediction`, for a checkpoint in one file; `auto` for what is known of it.
        loras_merged: `(name, weight)` of LoRAs to merge; see `loading.lora_files.find_lora` for names.
        image_inputs: jobs may start from a picture.
        controlnets: by name, the folders or hub names of ControlNets.
        loras: of single jobs: by name, what `loras_merged` has without names; or a folder of them; None for none.
        lora_rank: that the programs have room for.
        prompt_windows: how many windows of 75 tokens a job's prompt may have.
        embeddings: by word, files of textual inversion; or a folder of them; None for none.
    """

    revision: str = "main"
    guidance: str = "auto"
    tokenizer: str | None = None
    prediction_type: str = "auto"
    loras_merged: tuple[tuple[str, float], ...] = ()
    image_inputs: bool = True
    controlnets: Mapping[str, str] = field(default_factory=dict)
    loras: Mapping[str, str] | str | None = None
    lora_rank: int = 16
    prompt_windows: int = 3
    embeddings: Mapping[str, str] | str | None = None


def load_checkpoint(name: str, dtype: Any = jnp.float32, options: LoadOptions | None = None) -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: a folder or a `.safetensors` file, a hub name like `owner/name`, or `embedded` for the shipped one.
        dtype: of the parameters and the computation, `jnp.float32` or `jnp.bfloat16`.
        options: what else the settings say.

    Raises:
        InvalidCheckpoint: the checkpoint is missing, half-written, not of a family that is served, has a config that is
            not honoured in every key, or weights in another format than msgpack or safetensors; or a LoRA does not fit.
        ConfigurationError: a setting does not fit the checkpoint.
    """
    _, read = open_checkpoint(name, dtype, options)
    return read(lambda: None)


def open_checkpoint(
    name: str, dtype: Any = jnp.float32, options: LoadOptions | None = None
) -> tuple[Checkpoint, Callable[[Callable[[], None]], Checkpoint]]:
    """Read a checkpoint's configs alone.

    Args:
        name, dtype, options: as for `load_checkpoint`.

    Returns:
        The checkpoint with shapes in place of arrays, and what reads the arrays: see `LoadingCheckpoint`.

    Raises:
        InvalidCheckpoint: the checkpoint is missing, not of a family that is served, or has a config that is not
            honoured in every key.
        ConfigurationError: a setting does not fit the checkpoint.
    """
    options = options or LoadOptions()
    source = _open(find_folder(name, options.revision), options)
    # PyTorch's pipelines for 1.x and 2.x mend outdated configs; the one for XL does not.
    schedule = NoiseSchedule.from_config(source.scheduler_config, corrects_outdated=not source.is_xl)
    parts = Parts(
        source,
        dtype,
        options.loras_merged,
        options.image_inputs,
        options.controlnets,
        options.prompt_windows,
        options.embeddings,
    )
    defaults, is_guided = decide_guidance(name, schedule, parts.guidance_width, options.guidance)
    family = parts.family(is_guided)
    adapters = None
    if options.loras is not None:
        layout = AdapterLayout(options.lora_rank, dtype, family.adapter_layers)
        adapters = AdapterFiles(options.loras, layout, parts.lora_shapes)
    outline = Checkpoint(
        name=name,
        dtype=dtype,
        family=family,
        params=parts.shapes,
        schedule=schedule,
        defaults=defaults,
        safety_checker=_read_safety_checker(source) if source.has_safety_checker else None,
        adapters=adapters,
        embeddings=parts.embeddings.facts,
        prompt_windows=options.prompt_windows,
    )

    def read(go_on: Callable[[], None]) -> Checkpoint:
        params, loras = parts.read(go_on)
        checker = outline.safety_checker
        if checker is not None:
            weights = read_weights(source.open("safety_checker", checker.network.shapes), checker.network.shapes, _F32)
            checker = replace(checker, params=weights)
        return replace(outline, params=params, loras=loras, safety_checker=checker)

    return outline, read


def _open(path: Path, options: LoadOptions) -> Folder | CheckpointFile:
    """Return a folder or a file.

    Raises:
        ConfigurationError: a setting for files is set, and this is a folder.
    """
    prediction_type = None if options.prediction_type == "auto" else options.prediction_type
    if path.is_file():
        return CheckpointFile(path, options.tokenizer, prediction_type)
    if prediction_type is not None:
        raise ConfigurationError(
            f"sdtpu_prediction_type must be auto for {path}: it is a folder, whose scheduler_config.json says it; it is"
            " for checkpoints in one file"
        )
    if options.tokenizer is not None:
        raise ConfigurationError(
            f"sdtpu_tokenizer must not be set for {path}: it is a folder, which has its own; the setting is for"
            " checkpoints in one file"
        )
    return Folder(path)


def decide_guidance(name: str, schedule: NoiseSchedule, guidance_width: int, wanted: str) -> tuple[Defaults, bool]:
    """Return what a checkpoint does by default, and whether every job has a row for its negative prompt.

    Args:
        name: of the checkpoint, for the error.
        schedule: with its scheduler config.
        guidance_width: of the embedding by which its UNet is told the guidance scale; 0 for other UNets.
        wanted: `on`, `off` or `auto`, as `sdtpu_guidance`.

    Raises:
        ConfigurationError: the UNet is told the guidance scale, and `on` is wanted.
    """
    defaults = _defaults(schedule, guidance_width)
    if wanted == "on" and guidance_width:
        raise ConfigurationError(
            f"sdtpu_guidance must be auto or off for {name}: its UNet is told the guidance scale (time_cond_proj_dim),"
            " and makes one prediction of it, got on"
        )
    needs_guidance = not guidance_width and defaults.guidance_scale > 1
    is_guided = needs_guidance if wanted == "auto" else wanted == "on"
    if needs_guidance and not is_guided:
        defaults = replace(defaults, guidance_scale=1.0)
    return defaults, is_guided


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


def _read_safety_checker(source: Folder | CheckpointFile) -> LoadedSafetyChecker:
    from transformers import CLIPImageProcessor

    try:
        config = source.config("safety_checker")
        network = networks.safety_checker(read_safety_checker_config(config, source.label("safety_checker")))
        extractor = CLIPImageProcessor.from_pretrained(Path(source.name) / "feature_extractor", local_files_only=True)
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
        raise InvalidCheckpoint(
            f"{source.name}: the safety checker cannot be used: {type(exc).__name__}: {exc}"
        ) from exc
    shapes = {name: jax.ShapeDtypeStruct(shape, _F32) for name, shape in network.shapes.items()}
    return LoadedSafetyChecker(network, config, shapes, extractor)
