"""A checkpoint in one `.safetensors` file with the names of Stable Diffusion's original code, as people share them.

The file has tensors and nothing else. Which architecture it is, its shapes say; the configs of that architecture stand
here as data. Two things no file says: the vocabulary (every such file has CLIP's, which a folder must give), and for
2.x whether the model predicts noise or velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdtpu_worker.diffusion.original_names import autoencoder_name, open_clip_name, unet_names
from sdtpu_worker.diffusion.recognise import describe_family
from sdtpu_worker.diffusion.single_file_configs import CONFIGS, Architecture
from sdtpu_worker.diffusion.stored_tensors import StoredTensor, open_safetensors
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.diffusion.weights import broken, fit, some
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_IGNORED = ("model_ema.", "denoiser.", "loss.", "lora_", "control_model.")
"""What training leaves in a file beside the model: averages that the model's own tensors hold already, schedules."""
_IGNORED_ENDS = ("position_ids", "logit_scale", "attn_mask", "text_projection")
_FLAGS = {"v_pred": "prediction_type", "ztsnr": "rescale_betas_zero_snr"}
"""Empty tensors by which XL files say how they were trained."""


class SingleFile:
    """Gives what a folder in the diffusers layout gives, from one file; see `checkpoint_folder.Folder`.

    Args:
        path: of the file.
        tokenizer: folder with CLIP's vocabulary; None if the settings name none.
        prediction_type: `epsilon`, `v_prediction`, or None for what the architecture says.

    Raises:
        InvalidCheckpoint: the file is broken, or of no architecture that is served.
        ConfigurationError: a setting that the file needs is missing.
    """

    def __init__(self, path: Path, tokenizer: str | None, prediction_type: str | None) -> None:
        self.name = str(path)
        self._path = path
        try:
            self._tensors, _ = open_safetensors(path)
        except (OSError, ValueError) as exc:
            raise broken(path, exc) from exc
        self._architecture = _recognise(path, self._tensors)
        if tokenizer is None:
            raise ConfigurationError(
                "sdtpu_tokenizer must name a folder with CLIP's vocabulary (vocab.json and merges.txt, or"
                f" tokenizer.json): {path} has tensors only; any Stable Diffusion checkpoint in the diffusers layout"
                " has such a folder"
            )
        self._tokenizer = Path(tokenizer).expanduser()
        self.is_xl = self._architecture.is_xl
        self.has_safety_checker = False
        self.scheduler_config = self._schedule(prediction_type)
        self.zeroes_empty = True

    def config(self, part: str) -> Mapping[str, Any]:
        """Return a part's config."""
        config = self._architecture.configs[part]
        if part == "unet" and not self.is_xl and self.scheduler_config["prediction_type"] == "epsilon":
            return {**config, "sample_size": 64}  # 2.x for 512 pixels
        return config

    def label(self, part: str) -> str:
        """Return what an error calls a part's config."""
        return f"{self._path}, {part} of {self._architecture.name}"

    def tokenizer(self, name: str, most: int) -> PromptTokenizer:
        """Return CLIP's tokenizer with the padding of a text encoder."""
        return PromptTokenizer.from_folder(self._tokenizer, most, self._architecture.padding[name])

    def weights(
        self,
        part: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: Any,
        deltas: Mapping[str, Callable[[], np.ndarray]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return a part's parameters; see `weights.read_weights`."""
        if part == "unet":
            named = self._renamed(_UNET, unet_names(shapes))
        elif part == "vae":
            count = len(self._architecture.configs["vae"]["block_out_channels"])
            named = self._renamed(_VAE, {autoencoder_name(name, count): name for name in shapes})
        else:
            named = self._text_encoder(part, shapes)
        return fit(self._path, named, shapes, dtype, deltas)

    def check_all_used(self) -> None:
        """Make sure that no tensor of the file was passed over.

        Raises:
            InvalidCheckpoint: the text names those that were.
        """
        prefixes = (_UNET, _VAE, *self._architecture.text_prefixes.values(), *_IGNORED)
        left = [
            name
            for name in self._tensors
            if not name.startswith(prefixes) and not name.endswith(_IGNORED_ENDS) and "." in name
        ]
        if left:
            raise InvalidCheckpoint(
                f"{self._path}: it looks like {self._architecture.name} and has tensors that such a model has not:"
                f" {some(left)}; this file is of another kind of model, or of several in one"
            )

    def _renamed(self, prefix: str, names: Mapping[str, str]) -> dict[str, StoredTensor]:
        """Return the tensors under a prefix by today's names; a name that is not known stays, and is an error later."""
        found = {name.removeprefix(prefix): tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}
        return {names.get(name, name): tensor for name, tensor in found.items()}

    def _text_encoder(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
        prefix = self._architecture.text_prefixes[part]
        found = {name.removeprefix(prefix): tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}
        if prefix.endswith("transformer."):
            return {name: tensor for name, tensor in found.items() if not name.endswith(_IGNORED_ENDS)}
        return _from_open_clip(found, shapes)

    def _schedule(self, prediction_type: str | None) -> dict[str, Any]:
        config = dict(self._architecture.scheduler)
        if "v_pred" in self._tensors:
            config["prediction_type"] = "v_prediction"
        if "ztsnr" in self._tensors:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if prediction_type is not None:
            config["prediction_type"] = prediction_type
        if "prediction_type" not in config:
            raise ConfigurationError(
                f"sdtpu_prediction_type must be epsilon or v_prediction: {self._path} is a Stable Diffusion 2.x, and"
                " such a file does not say which (768-pixel models predict v, 512-pixel models epsilon)"
            )
        return config


def _from_open_clip(
    found: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Return an OpenCLIP text encoder's tensors by today's names.

    Layers after the last one that the config has are left out: 2.x takes the states before OpenCLIP's last layer.
    """
    named: dict[str, StoredTensor] = {}
    for name, tensor in found.items():
        if name.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
            layer, kind = name.split(".")[2], name.rpartition("_")[2]
            for i, which in enumerate(("q_proj", "k_proj", "v_proj")):
                named[f"text_model.encoder.layers.{layer}.self_attn.{which}.{kind}"] = tensor.third(i)
        elif name == "text_projection":
            named["text_projection.weight"] = tensor.transposed(1, 0)
        else:
            named[open_clip_name(name) or name] = tensor
    layers = {name.split(".")[3] for name in shapes if name.startswith("text_model.encoder.layers.")}

    def is_left_out(name: str) -> bool:
        parts = name.split(".")
        is_later_layer = name.startswith("text_model.encoder.layers.") and parts[3] not in layers
        return is_later_layer or (name.endswith((*_IGNORED_ENDS, "text_projection.weight")) and name not in shapes)

    return {name: tensor for name, tensor in named.items() if not is_left_out(name)}


def _recognise(path: Path, tensors: Mapping[str, StoredTensor]) -> Architecture:
    """Return the architecture whose shapes a file has.

    Raises:
        InvalidCheckpoint: none has; the text says what the file looks like.
    """
    for architecture in CONFIGS:
        if all(name in tensors and tensors[name].shape == shape for name, shape in architecture.signs.items()):
            return architecture
    raise InvalidCheckpoint(
        f"{path}: {_describe(tensors)}; one file must be a Stable Diffusion 1.x, 2.x or XL in the original layout, with"
        " its text encoders and its VAE"
    )


def _describe(tensors: Mapping[str, StoredTensor]) -> str:
    """Return what a file looks like, from names and shapes."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    looks_like = describe_family(shapes)
    if any(name.startswith(("unet.", "down_blocks.", "vae.")) for name in shapes):
        return f"it looks like {looks_like} in the diffusers layout"
    if f"{_UNET}input_blocks.0.0.weight" not in shapes:
        return f"it has no UNet, it looks like {looks_like}"
    return f"it looks like {looks_like}, of a size that is not known"
