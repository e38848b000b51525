"""A checkpoint as shapes: all that programs are traced from, made of configs alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.adapters import AdapterLayout
from sdtpu_worker.diffusion.checkpoint import Defaults, decide_guidance
from sdtpu_worker.diffusion.checkpoint_folder import EMBEDDED, find_folder
from sdtpu_worker.diffusion.families.family import Family, Params
from sdtpu_worker.diffusion.known_models import KNOWN_MODELS, ConfigFolder, KnownModel, usual_controlnet
from sdtpu_worker.diffusion.parts import Parts
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint


@dataclass(frozen=True)
class AbstractCheckpoint:
    """A checkpoint without weights.

    Attributes:
        name: what it was asked for as.
        family: the model.
        params: by part and tensor name, shapes and dtypes.
        defaults: what a request gets that asks for nothing else.
        adapters: how the LoRAs of single jobs lie; None for a worker whose jobs name none.
    """

    name: str
    family: Family
    params: Params
    defaults: Defaults
    adapters: AdapterLayout | None


def read_abstract(
    name: str,
    dtype: Any,
    guidance: str = "auto",
    lora_rank: int = 0,
    image_inputs: bool = True,
    prompt_windows: int = 1,
    controlnets: Mapping[str, str] | None = None,
) -> AbstractCheckpoint:
    """Read a model's configs.

    Args:
        name: one of `KNOWN_MODELS`, `embedded`, `embedded-turbo`, or a folder in the diffusers layout.
        dtype: of the parameters and the computation.
        guidance: as `sdtpu_guidance`.
        lora_rank: that the programs have room for, for LoRAs of single jobs; 0 for a worker whose jobs name none.
        image_inputs: as `sdtpu_image_inputs`.
        prompt_windows: as `sdtpu_prompt_windows`.
        controlnets: by name, folders with a ControlNet's config; an empty text for one as they are usual for the model.

    Raises:
        InvalidCheckpoint: there is no such model, or a config is not honoured in every key.
        ConfigurationError: `guidance` does not fit the checkpoint.
    """
    source = _find(name)
    schedule = NoiseSchedule.from_config(source.scheduler_config, corrects_outdated=not source.is_xl)
    with tempfile.TemporaryDirectory(prefix="sdtpu-controlnets-") as scratch:
        folders = {
            each: folder or _write_usual_controlnet(source, Path(scratch, str(number)))
            for number, (each, folder) in enumerate((controlnets or {}).items())
        }
        parts = Parts(source, dtype, takes_pictures=image_inputs, controlnets=folders, prompt_windows=prompt_windows)
        defaults, is_guided = decide_guidance(name, schedule, parts.guidance_width, guidance)
        family = parts.family(is_guided)
    layout = AdapterLayout(lora_rank, dtype, family.adapter_layers) if lora_rank else None
    if layout is not None and not any(layout.layers.values()):
        raise ConfigurationError(f"--lora-rank must be 0 for {name}: it has no layer that a LoRA may change")
    return AbstractCheckpoint(name, family, parts.shapes, defaults, layout)


def _write_usual_controlnet(source: KnownModel | ConfigFolder, folder: Path) -> str:
    """Write the config of a ControlNet as they are usual for a model: a copy of its UNet's way down."""
    config = usual_controlnet(source.config("unet"), len(source.config("vae")["block_out_channels"]))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _find(name: str) -> KnownModel | ConfigFolder:
    if name in KNOWN_MODELS:
        return KnownModel(name)
    if name in EMBEDDED:
        return ConfigFolder(find_folder(name, "main"))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InvalidCheckpoint(
            f"--model must be one of {', '.join((*KNOWN_MODELS, *EMBEDDED))}, or a folder with a checkpoint's configs"
            f" in the diffusers layout; there is no folder {name!r}"
        )
    return ConfigFolder(folder)
