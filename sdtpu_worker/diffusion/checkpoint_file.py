"""A checkpoint in one `.safetensors` file in the original layout, as people share them.

The file has tensors and nothing else. Its architecture is seen from their names, and the configs are those of the
published checkpoints. Two things no file says: the vocabulary (every such file has CLIP's, which a folder must give),
and for 2.x whether the model predicts noise or velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.loading import architectures
from sdtpu_worker.diffusion.loading.single_file import open_single_file
from sdtpu_worker.diffusion.loading.tensors import Shapes, TensorSource
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import ConfigurationError


class CheckpointFile:
    """Gives what a folder in the diffusers layout gives, from one file; see `checkpoint_folder.Folder`.

    Args:
        path: of the file.
        tokenizer: folder with CLIP's vocabulary; None if the settings name none.
        prediction_type: `epsilon`, `v_prediction`, or None for what the file or its architecture says.

    Raises:
        InvalidCheckpoint: the file is broken, or of no architecture that is served, or has tensors of anything else.
        ConfigurationError: a setting that the file needs is missing.
    """

    has_safety_checker = False
    zeroes_empty = True

    def __init__(self, path: Path, tokenizer: str | None, prediction_type: str | None) -> None:
        self.name = str(path)
        self._file = open_single_file(path)
        self._architecture = self._file.architecture
        self._tokenizer = _find_vocabulary(path, tokenizer)
        self.is_xl = self._architecture == "sdxl"
        self.scheduler_config = self._schedule(prediction_type)

    def config(self, part: str) -> Mapping[str, Any]:
        """Return a part's config."""
        if part == "unet":
            return self._unet_config()
        if part == "vae":
            return architectures.VAES[self._architecture]
        return architectures.TEXT_ENCODERS[self._architecture][part]

    def label(self, part: str) -> str:
        """Return what an error calls a part's config."""
        return f"{self.name}, {part} of {architectures.NAMES[self._architecture]}"

    def tokenizer(self, name: str, most: int) -> PromptTokenizer:
        """Return CLIP's tokenizer with the padding of a text encoder."""
        return PromptTokenizer.from_folder(self._tokenizer, most, architectures.PADDING[self._architecture][name])

    def open(self, part: str, shapes: Shapes) -> TensorSource:
        """Return a part's tensors; see `SingleFile.part`."""
        return self._file.part(part, shapes)

    def _unet_config(self) -> Mapping[str, Any]:
        config = {**architectures.UNETS[self._architecture], "in_channels": self._file.in_channels}
        if self._architecture == "sd2" and self.scheduler_config["prediction_type"] == "v_prediction":
            config["sample_size"] = 96  # these were trained at 768 pixels, those that predict the noise at 512
        return config

    def _schedule(self, prediction_type: str | None) -> dict[str, Any]:
        if prediction_type is None and "v_pred" in self._file.marks:
            prediction_type = "v_prediction"
        if prediction_type is None and self._architecture == "sd2":
            raise ConfigurationError(
                f"sdtpu_prediction_type must be epsilon or v_prediction: {self.name} is a Stable Diffusion 2.x, and"
                " such a file does not say which (768-pixel models predict v, 512-pixel models epsilon)"
            )
        config = architectures.scheduler_config(self._architecture, prediction_type or "epsilon")
        if "ztsnr" in self._file.marks:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


def _find_vocabulary(path: Path, tokenizer: str | None) -> Path:
    """Return the folder with the vocabulary for a file, which has none.

    Args:
        path: of the checkpoint, for the error.
        tokenizer: what the setting names: a tokenizer's folder, or a checkpoint's with `tokenizer/` in it.

    Raises:
        ConfigurationError: no folder is given, or it holds no vocabulary.
    """
    if tokenizer is None:
        raise ConfigurationError(
            "sdtpu_tokenizer must name a folder with CLIP's vocabulary (vocab.json and merges.txt, or"
            f" tokenizer.json): {path} has tensors only; any Stable Diffusion checkpoint in the diffusers layout has"
            " such a folder"
        )
    folder = Path(tokenizer).expanduser()
    for place in (folder / "tokenizer", folder):
        names = {each.name for each in place.iterdir()} if place.is_dir() else set()
        if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
            return place
    raise ConfigurationError(
        "sdtpu_tokenizer must name a folder with CLIP's vocabulary (vocab.json and merges.txt, or tokenizer.json),"
        f" itself or in `tokenizer/`; {folder} has none"
    )
