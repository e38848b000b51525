"""Models that can be planned for by name: the configs of public checkpoints, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sdtpu_worker.diffusion.checkpoint_folder import Folder
from sdtpu_worker.diffusion.json_files import read_json
from sdtpu_worker.diffusion.loading import architectures
from sdtpu_worker.diffusion.loading.tensors import Shapes, TensorSource
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.config_tables import CONTROLNET

_DEFAULT_LENGTH = 77
_ARCHITECTURES = {"sd15": ("sd1", "epsilon"), "sd21": ("sd2", "v_prediction"), "sdxl": ("sdxl", "epsilon")}
KNOWN_MODELS = tuple(_ARCHITECTURES)
"""Stable Diffusion 1.5 at 512 x 512, 2.1 at 768 x 768, and XL base 1.0 at 1024 x 1024."""


@dataclass(frozen=True)
class PromptLength:
    """Stands for a tokenizer where there are no prompts: programs need nothing of it but the length.

    Attributes:
        length: tokens of a prompt.
    """

    length: int

    def with_words(self, words: Mapping[str, Any]) -> Self:
        """Words change no length."""
        return self


class KnownModel:
    """Gives the configs that a folder in the diffusers layout gives; see `checkpoint_folder.Folder`.

    Args:
        name: one of `KNOWN_MODELS`.
    """

    has_safety_checker = False
    zeroes_empty = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._architecture, prediction_type = _ARCHITECTURES[name]
        self.is_xl = self._architecture == "sdxl"
        self.scheduler_config = architectures.scheduler_config(self._architecture, prediction_type)

    def config(self, part: str) -> Mapping[str, Any]:
        """Return a part's config."""
        if part == "vae":
            return architectures.VAES[self._architecture]
        if part != "unet":
            return architectures.TEXT_ENCODERS[self._architecture][part]
        size = {"sample_size": 96} if self.name == "sd21" else {}
        return {**architectures.UNETS[self._architecture], "in_channels": 4, **size}

    def label(self, part: str) -> str:
        """Return what an error calls a part's config."""
        return f"{self.name}, {part} of {architectures.NAMES[self._architecture]}"

    def tokenizer(self, name: str, most: int) -> Any:
        """Return the length of prompts."""
        return PromptLength(min(_DEFAULT_LENGTH, most))

    def open(self, part: str, shapes: Shapes) -> TensorSource:
        """There are no tensors.

        Raises:
            InvalidCheckpoint: always.
        """
        raise InvalidCheckpoint(f"{self.name} is a name for plans and has no weights; sdtpu_model must be a checkpoint")


def usual_controlnet(unet: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """Return the config of a ControlNet as public ones are for a model: a copy of its UNet's way down.

    Args:
        unet: the config of the model's UNet.
        levels: of the model's autoencoder, each of which halves the sides but the first.
    """
    shared = {key: value for key, value in unet.items() if key in CONTROLNET.keys() - {"in_channels"}}
    embedding = [16, 32, 96, *[256] * levels][:levels]
    return {**shared, "_class_name": "ControlNetModel", "conditioning_embedding_out_channels": embedding}


class ConfigFolder(Folder):
    """A checkpoint's folder of which only the configs are read: it may lack weights and vocabulary.

    Args:
        path: of the folder.

    Raises:
        InvalidCheckpoint: it is no checkpoint that this worker runs.
    """

    def tokenizer(self, name: str, most: int) -> Any:
        """Return the length of prompts, as the tokenizer's config says."""
        path = self.path / name / "tokenizer_config.json"
        length = read_json(path).get("model_max_length") if path.is_file() else None
        if not isinstance(length, int | float) or not 2 < length <= 100_000:  # a larger one stands for "no limit"
            length = _DEFAULT_LENGTH
        return PromptLength(min(int(length), most))
