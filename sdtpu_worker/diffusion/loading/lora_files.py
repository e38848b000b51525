"""Where a LoRA's file is, and the alphas that its tensors do not say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.loading.lora_names import split_part
from sdtpu_worker.diffusion.loading.safetensors_file import REMEDY
from sdtpu_worker.errors import InvalidCheckpoint

EMBEDDED_LORAS = {"embedded-outline": "checkpoint/loras/outline.safetensors"}
"""The LoRAs that the package brings for its checkpoints, by name, with their files in it."""
_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", _PEFT_NAME)


def find_lora(name: str, setting: str = "sdtpu_loras_merged") -> Path:
    """Return the file of a LoRA.

    Args:
        name: a `.safetensors` file, a folder with one, `owner/name` or `owner/name/file.safetensors` on the hub,
            which is downloaded, or `embedded-outline` for the shipped one.
        setting: where the name stands; errors begin with it.

    Raises:
        InvalidCheckpoint: there is no such file, or several, or the hub does not give it; a pickle is never taken.
    """
    if name in EMBEDDED_LORAS:
        return Path(str(resources.files("sdtpu_worker"))) / EMBEDDED_LORAS[name]
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        if path.suffix != ".safetensors":
            raise InvalidCheckpoint(f"{setting}: {name} must be a .safetensors file, never a pickle; {REMEDY}")
        return path
    if path.is_dir():
        return _one_file(path, name, setting)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    is_hub_name = owner and repository and not name.startswith((".", "~")) and ".." not in name
    if not is_hub_name or repository.endswith(".safetensors") or (file and not file.endswith(".safetensors")):
        raise InvalidCheckpoint(
            f"{setting}: there is no file or folder {name!r}, a hub name is like 'owner/name' or"
            f" 'owner/name/file.safetensors', and the package brings {', '.join(EMBEDDED_LORAS)}"
        )
    folder = _download(f"{owner}/{repository}", file, name, setting)
    return folder / file if file else _one_file(folder, name, setting)


def _download(repository: str, file: str, name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [file or "*.safetensors", str(Path(file).parent / _PEFT_CONFIG)]
    try:
        return Path(snapshot_download(repository, revision="main", allow_patterns=patterns))
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"{setting}: no file or folder {name!r} here, and the hub did not give it"
            f" ({type(exc).__name__}: {exc}); check the name"
        ) from exc


def _one_file(folder: Path, name: str, setting: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    for usual in _USUAL_NAMES:
        if folder / usual in found:
            return folder / usual
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise InvalidCheckpoint(
            f"{setting}: {name} must hold one .safetensors file (found {listed}); name the file itself"
        )
    return found[0]


class PeftAlphas:
    """The alphas of a file without tensors for them: in its metadata (diffusers), or a config beside it (PEFT).

    Args:
        path: of the LoRA.
        metadata: of the file.

    Raises:
        InvalidCheckpoint: the config is broken.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._config: Any = {}
        beside = path.parent / _PEFT_CONFIG
        try:
            if "lora_adapter_metadata" in metadata:
                self._config = json.loads(metadata["lora_adapter_metadata"]) or {}
            elif path.name == _PEFT_NAME and beside.is_file():
                self._config = {f"unet.{key}": value for key, value in json.loads(beside.read_bytes()).items()}
            if not isinstance(self._config, dict):
                raise TypeError(f"{type(self._config).__name__} for an object")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise InvalidCheckpoint(
                f"{path}: the LoRA's config cannot be read: {exc}; download both again, or save the LoRA anew"
            ) from exc

    def scale(self, module: str, rank: int) -> float:
        """Return alpha / rank, or what the config says instead; 1 without an alpha.

        Args:
            module: as the file names it.
            rank: of its matrices.

        Raises:
            InvalidCheckpoint: the alpha is no number.
        """
        part, rest = split_part(module)
        alpha = self._config.get(f"{part}.lora_alpha")
        patterns = self._config.get(f"{part}.alpha_pattern") or {}
        try:
            for pattern, its_alpha in patterns.items():
                if rest == pattern or rest.endswith(f".{pattern}"):
                    alpha = its_alpha
            if alpha is None:
                return 1.0
            return float(alpha) / (math.sqrt(rank) if self._config.get(f"{part}.use_rslora") else rank)
        except (AttributeError, TypeError, ValueError, OverflowError) as exc:
            raise InvalidCheckpoint(
                f"{self._path}: the LoRA's config has no usable alpha: {exc}; download it again, or save the LoRA anew"
            ) from exc
