"""The folder of a checkpoint in the diffusers layout: where it is, what its files say."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.json_files import read_json
from sdtpu_worker.diffusion.loading.hub import download_weights
from sdtpu_worker.diffusion.loading.part_files import has_weights, open_part
from sdtpu_worker.diffusion.loading.tensors import Shapes, TensorSource
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidCheckpoint

EMBEDDED = {"embedded": "checkpoint", "embedded-turbo": "checkpoint_turbo"}
"""The checkpoints that the package brings, by name, with their folders in it."""
_FILES = ["*.json", "*/*.json", "tokenizer*/*.txt"]
_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
_XL_PARTS = {**_PARTS, "text_encoder_2": "CLIPTextModelWithProjection"}
_ALSO = {"vae": ("AutoencoderTiny",)}
_OTHERS = {"scheduler", "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor"}
_SERVED = "this worker runs Stable Diffusion 1.x, 2.x and XL checkpoints, and what is distilled from them"


def find_folder(name: str, revision: str) -> Path:
    """Return the folder of a checkpoint, or its file; one from a hub is downloaded.

    Raises:
        InvalidCheckpoint: there is none of this name.
    """
    if name in EMBEDDED:
        return Path(str(resources.files("sdtpu_worker"))) / EMBEDDED[name]
    folder = Path(name).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".safetensors"):
        return folder
    if folder.is_file():
        raise InvalidCheckpoint(
            f"sdtpu_model must be a folder in the diffusers layout or a .safetensors file, got the file {name!r};"
            " convert it where it is trusted, with diffusers' `from_single_file` and"
            " `save_pretrained(safe_serialization=True)`"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or folder.exists():
        raise InvalidCheckpoint(
            f"sdtpu_model must be a folder, a .safetensors file, a hub name like 'owner/name', or one of"
            f" {', '.join(EMBEDDED)}; there is no folder {name!r}"
        )
    try:
        return download_weights(name, revision, _FILES, _is_whole, prefix="*/")
    except InvalidCheckpoint:
        raise
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"no folder {name!r} here, and the hub did not give a checkpoint of that name at revision"
            f" {revision!r} ({type(exc).__name__}: {exc}); check sdtpu_model and sdtpu_revision"
        ) from exc


class Folder:
    """A checkpoint in the diffusers layout; `checkpoint_file.CheckpointFile` gives the same of one file.

    Args:
        path: of the folder.

    Attributes:
        name: for errors.
        is_xl: it has two text encoders.
        has_safety_checker: it has one.
        scheduler_config: the scheduler's.
        zeroes_empty: an XL checkpoint takes zeros for an empty negative prompt.

    Raises:
        InvalidCheckpoint: it is no checkpoint that this worker runs.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        classes = read_classes(path)
        check_classes(path, classes)
        self.is_xl, self.has_safety_checker = "text_encoder_2" in classes, "safety_checker" in classes
        self.scheduler_config = _read(path / "scheduler" / "scheduler_config.json", path)
        index = _read(path / "model_index.json", path)
        self.zeroes_empty = bool(index.get("force_zeros_for_empty_prompt", True))

    def config(self, part: str) -> Mapping[str, Any]:
        """Return a part's config."""
        return _read(self.path / part / "config.json", self.path)

    def label(self, part: str) -> str:
        """Return what an error calls a part's config."""
        return str(self.path / part / "config.json")

    def tokenizer(self, name: str, most: int) -> PromptTokenizer:
        """Return the tokenizer in a folder of this name."""
        return PromptTokenizer.from_folder(self.path / name, most)

    def open(self, part: str, shapes: Shapes) -> TensorSource:
        """Return a part's tensors; their names do not depend on the shapes."""
        return open_part(self.path, part)


def _is_whole(folder: Path) -> bool:
    """Return whether every part has its weights."""
    return all(has_weights(folder, part) for part in {*_XL_PARTS, "safety_checker"} & set(read_classes(folder)))


def read_classes(folder: Path) -> dict[str, str]:
    """Return by part the class that `model_index.json` names for it."""
    index = _read(folder / "model_index.json", folder)
    return {
        part: str(entry[1]).removeprefix("Flax")
        for part, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1]
    }


def check_classes(folder: Path, classes: Mapping[str, str]) -> None:
    """Make sure that the parts are those of a checkpoint that this worker runs.

    Raises:
        InvalidCheckpoint: a part is missing, of another class, or one that this worker does not know.
    """
    wanted = _XL_PARTS if "text_encoder_2" in classes else _PARTS
    for part, name in wanted.items():
        allowed = (name, *_ALSO.get(part, ()))
        if classes.get(part) not in allowed:
            raise InvalidCheckpoint(
                f"{folder}: model_index.json must name {' or '.join(allowed)} as {part}, got {classes.get(part)};"
                f" {_SERVED}"
            )
    if more := sorted(set(classes) - set(wanted) - _OTHERS):
        raise InvalidCheckpoint(
            f"{folder}: model_index.json names {', '.join(more)} ({', '.join(classes[part] for part in more)}), which"
            f" would be left out; {_SERVED}"
        )


def _read(path: Path, folder: Path) -> Mapping[str, Any]:
    """Return what a file of a checkpoint says.

    Raises:
        InvalidCheckpoint: it is missing, or holds no JSON object.
    """
    if not path.exists():
        raise InvalidCheckpoint(
            f"{folder} is not a checkpoint in the diffusers layout: {path.relative_to(folder)} is missing"
        )
    return read_json(path)
