"""Textual inversion: words that a prompt may use, each with vectors out of a file (`sdtpu_embeddings`).

Read once, when the worker starts: the vectors become rows of the token embedding tables of the text encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdtpu_worker.diffusion.loading.fit import is_float
from sdtpu_worker.diffusion.loading.lora_files import find_lora
from sdtpu_worker.diffusion.loading.safetensors_file import open_safetensors
from sdtpu_worker.diffusion.loading.tensors import StoredTensor, some
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.redaction import brief

MOST_VECTORS = 75
"""Of a word: as many tokens as a window has."""
_PICKLES = (".pt", ".bin", ".ckpt", ".pth")
_OF_XL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_ROWS = 128  # a table grows in steps of so many, so that one more word seldom makes another program to compile
_REMEDY = (
    "convert it where it is trusted: read it with torch.load(path, weights_only=True), and save"
    ' {"emb_params": its "string_to_param"["*"]} with safetensors.torch.save_file'
)


@dataclass(frozen=True)
class Embeddings:
    """The words with vectors of their own.

    Attributes:
        vectors: by word and part (a text encoder), `(n, width) float32`; the same n for all parts of a word.
        facts: of each word, with a digest of its vectors: what decides pixels.
    """

    vectors: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict, repr=False)
    facts: tuple[tuple[str, str], ...] = ()

    def words(self, vocabulary: int) -> dict[str, range]:
        """Return by word the ids that it stands for, where the table has this many rows without them."""
        found, first = {}, vocabulary
        for word, parts in self.vectors.items():
            count = len(next(iter(parts.values())))
            found[word] = range(first, first + count)
            first += count
        return found

    def more_rows(self, part: str) -> int:
        """Return by how many rows `extend` makes the table of a text encoder longer."""
        return -(-sum(len(parts[part]) for parts in self.vectors.values()) // _ROWS) * _ROWS

    def extend(self, table: np.ndarray, part: str) -> np.ndarray:
        """Return a text encoder's token embedding table `(V, width)` with the vectors, and some zeros, below.

        Raises:
            InvalidCheckpoint: a vector is not finite in the table's dtype.
        """
        if not self.vectors:
            return table
        rows = np.zeros((self.more_rows(part), table.shape[1]), table.dtype)
        first = 0
        for word, parts in self.vectors.items():
            with np.errstate(over="ignore"):  # what becomes infinite is found below
                rows[first : first + len(parts[part])] = parts[part].astype(table.dtype)
            if not np.isfinite(rows[first : first + len(parts[part])]).all():
                raise InvalidCheckpoint(
                    f"sdtpu_embeddings: {word} has NaN or infinity as {table.dtype.name}; take another"
                )
            first += len(parts[part])
        return np.concatenate([table, rows])


def read_embeddings(sources: Mapping[str, str] | str | None, widths: Mapping[str, int]) -> Embeddings:
    """Read all embeddings.

    Args:
        sources: by word, a `.safetensors` file, a folder with one, or a name on the hub, as for `find_lora`; or a
            folder, each of whose files is an embedding under its name; None for none.
        widths: by part, the features of the text encoder.

    Raises:
        ConfigurationError: the folder does not exist, or two words differ in the case of their letters alone.
        InvalidCheckpoint: a file is missing or broken, or is for another model; the text names it.
    """
    files = _find_files(sources)
    folded: dict[str, str] = {}
    for word in files:
        if (other := folded.setdefault(word.casefold(), word)) != word:
            raise ConfigurationError(
                f"sdtpu_embeddings must have words that differ, got {brief(other)} and {brief(word)}"
            )
    vectors = {word: _read(word, path, widths) for word, path in sorted(files.items())}
    facts = []
    for word, parts in vectors.items():
        digest = hashlib.blake2b(digest_size=16)
        for part in sorted(parts):
            digest.update(f"{part} {parts[part].shape}".encode() + parts[part].tobytes())
        facts.append((word, digest.hexdigest()))
    return Embeddings(vectors, tuple(facts))


def _find_files(sources: Mapping[str, str] | str | None) -> dict[str, Path]:
    if not isinstance(sources, str):
        named = sources or {}
        for word, source in named.items():
            if source.endswith(_PICKLES):
                raise _is_pickle(word, source)
        return {word: find_lora(source, "sdtpu_embeddings") for word, source in named.items()}
    folder = Path(sources).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(
            f"sdtpu_embeddings must be a folder, or words with sources like 'mood=/models/mood.safetensors', and there"
            f" is no folder {sources!r}"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise _is_pickle(path.stem, str(path))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def _is_pickle(word: str, source: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"sdtpu_embeddings: {word} is {source}, a pickle, which can run code when it is opened, and is never"
        f" read; {_REMEDY}"
    )


def _read(word: str, path: Path, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the vectors of a word by part, `(n, width) float32`.

    Raises:
        InvalidCheckpoint: they are not for these text encoders, or no vectors at all.
    """
    try:
        tensors, _ = open_safetensors(path)
    except InvalidCheckpoint as exc:
        raise InvalidCheckpoint(f"sdtpu_embeddings: {word} cannot be used: {exc}") from exc
    found = {part: _as_rows(word, path, tensor, widths[part]) for part, tensor in _by_part(word, path, tensors, widths)}
    counts = {len(rows) for rows in found.values()}
    if len(counts) > 1:
        raise _unusable(word, path, f"its text encoders have different numbers of vectors ({sorted(counts)})")
    return found


def _by_part(
    word: str, path: Path, tensors: Mapping[str, StoredTensor], widths: Mapping[str, int]
) -> Sequence[tuple[str, StoredTensor]]:
    """Return the tensor for each part."""
    names = sorted(tensors)
    if len(widths) > 1:
        if names != sorted(_OF_XL.values()):
            raise _unusable(
                word, path, f"one for Stable Diffusion XL has the tensors clip_g and clip_l, and this has {some(names)}"
            )
        return [(part, tensors[_OF_XL[part]]) for part in widths]
    if len(names) != 1:
        kind = "it is for Stable Diffusion XL" if "clip_g" in names else "it must have one tensor"
        raise _unusable(word, path, f"{kind}, and has {some(names) or 'none'}")
    (part,) = widths
    return [(part, tensors[names[0]])]


def _as_rows(word: str, path: Path, tensor: StoredTensor, width: int) -> np.ndarray:
    shape = tensor.shape
    if not 1 <= len(shape) <= 2 or shape[-1] != width or not is_float(tensor.dtype):
        raise _unusable(
            word, path, f"this checkpoint's vectors are floating-point numbers, {width} each, and its are"
            f" {tensor.dtype} {shape}: it is for another model"
        )  # fmt: skip
    count = shape[0] if len(shape) == 2 else 1
    if not 1 <= count <= MOST_VECTORS:
        raise _unusable(word, path, f"a word may stand for 1 to {MOST_VECTORS} vectors, and it has {count:,}")
    rows = tensor.read().astype(np.float32).reshape(count, width)
    if not np.isfinite(rows).all():
        raise _unusable(word, path, "it has NaN or infinity")
    return rows


def _unusable(word: str, path: Path, why: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"sdtpu_embeddings: {word} cannot be used: {path}: {why}")
