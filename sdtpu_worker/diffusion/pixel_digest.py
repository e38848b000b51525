"""A digest of everything that decides a job's pixels: two jobs with the same one get the same pixels, bit for bit.

This is the one place where such facts come together. What an engine is stands in the fingerprint of its snapshots, to
which every byte of its weights and what its compiler was told are added here. What a job is stands in the prepared job,
as the programs get it: token ids and not the prompt, coefficients and not the sampler's name, the contents of pictures
and LoRAs and not their names. A field that `PreparedJob` gets comes in by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.adapters import JobAdapters
from sdtpu_worker.diffusion.cache import COMPILER_VARIABLES
from sdtpu_worker.diffusion.checkpoint import Checkpoint

if TYPE_CHECKING:
    from sdtpu_worker.diffusion.preparation import PreparedJob

_NOT_PIXELS = frozenset({"task_id", "load"})
"""Fields of a prepared job that change no pixel: its name, and what it costs."""


def pixel_digests(checkpoint: Checkpoint, fingerprints: Mapping[Lane, str]) -> Callable[[PreparedJob], str]:
    """Return what gives the digest of a job; every weight is read once, 1.7 GiB a second by each core (SHA-256).

    Args:
        checkpoint: the loaded model.
        fingerprints: by lane, what a snapshot's fingerprint is; see `snapshot.fingerprint_of`.
    """
    engine = [digest_weights(checkpoint), jax.devices()[0].client.platform_version]
    engine += [os.environ.get(name) for name in COMPILER_VARIABLES]

    def digest_of(job: PreparedJob) -> str:
        digest = hashlib.blake2b(digest_size=32)
        _add(digest.update, [*engine, fingerprints[job.lane]])
        for field in dataclasses.fields(job):
            if field.name not in _NOT_PIXELS:
                _add(digest.update, [field.name, getattr(job, field.name)])
        return digest.hexdigest()

    return digest_of


def digest_weights(checkpoint: Checkpoint) -> str:
    """Return a digest of every parameter of a checkpoint, its ControlNets and its safety checker."""
    checker = checkpoint.safety_checker
    parts: list[Any] = [checkpoint.params, None if checker is None else checker.params]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count(), "sdtpu-digest") as threads:  # a digest of much data lets others run
        for each in threads.map(_digest_leaf, jax.tree_util.tree_leaves_with_path(parts)):
            digest.update(each)
    _add(digest.update, None if checker is None else repr(checker.extractor))
    return digest.hexdigest()


def _digest_leaf(leaf: tuple[Any, Any]) -> bytes:
    path, array = leaf
    digest = hashlib.sha256()
    _add(digest.update, [jax.tree_util.keystr(path), np.asarray(array)])
    return digest.digest()


def _add(update: Callable[[Any], None], value: Any) -> None:
    """Add a value to a digest so that no two values add the same bytes.

    Raises:
        TypeError: the value is of a kind that has no rule here.
    """
    if isinstance(value, JobAdapters):
        value = value.digest
    if value is None or isinstance(value, bool | int | float | str):
        text = f"{type(value).__name__} {value!r}".encode(errors="surrogatepass")
        update(f"{len(text)}:".encode() + text)
    elif isinstance(value, bytes):
        update(f"bytes {len(value)}:".encode() + value)
    elif isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        update(f"array {array.dtype} {np.shape(value)}:".encode())
        update(array.reshape(-1).view(np.uint8))
    elif isinstance(value, Mapping):
        _add(update, [part for name in sorted(value) for part in (name, value[name])])
    elif isinstance(value, AbstractSet):
        _add(update, sorted(value))
    elif isinstance(value, Sequence):
        update(f"[{len(value)}:".encode())
        for part in value:
            _add(update, part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(update, [getattr(value, field.name) for field in dataclasses.fields(value)])
    else:
        raise TypeError(
            f"a digest cannot tell {type(value).__name__} values apart: give them a rule in pixel_digest.py"
        )
