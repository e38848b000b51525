"""Download weights from a model hub in one variant and one format, and never a pickle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

# A hub often has the same weights in several variants and formats. The order is that of `part_files.find_weights`.
_WEIGHTS = (
    ["*model.safetensors", "*model-?????-of-?????.safetensors"],
    ["*fp16*.safetensors"],
    ["*bf16*.safetensors"],
    ["*model[.-]*.safetensors"],
    ["*.msgpack"],
)


def download_weights(
    name: str, revision: str, others: Sequence[str], is_whole: Callable[[Path], bool], prefix: str = ""
) -> Path:
    """Download one kind of weights after the other until they are whole, and return the folder.

    Args:
        name: of the repository, `owner/name`.
        revision: a branch, a tag or a commit.
        others: patterns of what is wanted besides weights.
        is_whole: tells of the folder whether all weights are there.
        prefix: before the patterns of weights: `*/` where each part has a folder.

    Raises:
        Exception: the hub client's own, requests' and OS errors alike, and what `is_whole` raises.
    """
    from huggingface_hub import snapshot_download

    for patterns in _WEIGHTS:
        wanted = [*others, *(prefix + pattern for pattern in patterns)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if is_whole(folder):
            break
    return folder
