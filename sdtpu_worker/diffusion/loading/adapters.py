"""The LoRAs that single jobs name (`sdtpu_loras`): found by name, read once, added up for a job.

Any thread may ask. A file that is replaced counts as another LoRA from the next job on.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sdtpu_worker.diffusion.adapters import AdapterLayout, JobAdapters
from sdtpu_worker.diffusion.loading.lora import LoraLayer, read_layers
from sdtpu_worker.diffusion.loading.lora_files import find_lora
from sdtpu_worker.diffusion.loading.lora_names import ModuleNames
from sdtpu_worker.diffusion.loading.tensors import Shapes, some
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint, InvalidRequest
from sdtpu_worker.redaction import brief

Value = TypeVar("Value")
_KEPT = 8  # of files as well as of combinations; one of SD 1.5 with rank 16 takes about 40 MB


@dataclass(frozen=True)
class _Lora:
    """One file in memory.

    Attributes:
        rank: the largest of its layers'.
        digest: of the file's layers and alphas.
        layers: by part and parameter, `down (in, rank)` and `up (rank, out)` float32, `up` times alpha / rank.
    """

    rank: int
    digest: bytes
    layers: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]


class AdapterFiles:
    """Finds and reads the LoRAs that jobs name.

    Args:
        sources: by name, as for `find_lora`; or a folder.
        layout: how they lie on the devices.
        shapes: by part, those of the model's parameters.

    Raises:
        ConfigurationError: the folder does not exist.
        InvalidCheckpoint: a LoRA with a name is missing or broken, or does not fit the model.
    """

    def __init__(self, sources: Mapping[str, str] | str, layout: AdapterLayout, shapes: Mapping[str, Shapes]) -> None:
        self.layout, self._shapes, self._names = layout, shapes, ModuleNames(shapes)
        self._folder = Path(sources).expanduser() if isinstance(sources, str) else None
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigurationError(
                f"sdtpu_loras must be a folder, or names with sources like 'pixel=/models/pixel.safetensors', and"
                f" there is no folder {str(sources)!r}"
            )
        named = {} if isinstance(sources, str) else sources
        self._files = {name: find_lora(source, "sdtpu_loras") for name, source in named.items()}
        for path in self._files.values():
            self._open(path)
        self._loras: _Recent[_Lora] = _Recent()
        self._combinations: _Recent[JobAdapters] = _Recent()

    def names(self) -> list[str]:
        """Return the names that there are now, in order."""
        if self._folder is None:
            return sorted(self._files)
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    def load(self, wanted: Sequence[tuple[str, float]]) -> JobAdapters:
        """Return the sum of some LoRAs.

        Args:
            wanted: names with weights, at least one.

        Raises:
            InvalidRequest: a name is not known; its file is broken, for another model or of a kind that is not served;
                or the ranks add up to more than the programs have room for.
        """
        loras = [self._read(name) for name, _ in wanted]
        room = self.layout.rank
        if (total := sum(lora.rank for lora in loras)) > room:
            each = " + ".join(f"{lora.rank} ({name})" for (name, _), lora in zip(wanted, loras, strict=True))
            raise InvalidRequest(
                f"loras must have ranks that add up to {room} or less (sdtpu_lora_rank), got {each} = {total}"
            )
        weights = [weight for _, weight in wanted]
        digest = hashlib.blake2b(digest_size=8)
        for lora, weight in zip(loras, weights, strict=True):
            digest.update(lora.digest + np.float64(weight).tobytes())
        key = digest.digest()
        return self._combinations.get(key, lambda: self._combine(key, loras, weights, [name for name, _ in wanted]))

    def _find(self, name: str) -> Path:
        path = self._files.get(name)
        if path is None and self._folder is not None and name in self.names():
            path = self._folder / f"{name}.safetensors"
        if path is None:
            raise InvalidRequest(
                f"loras must be of {', '.join(self.names()) or 'none, as there is no file'} (sdtpu_loras),"
                f" got {brief(name)}"
            )
        return path

    def _read(self, name: str) -> _Lora:
        path = self._find(name)
        try:
            state = path.stat()
            return self._loras.get((path, state.st_mtime_ns, state.st_size), lambda: _read(self._open(path)))
        except InvalidCheckpoint as exc:
            raise InvalidRequest(f"loras: {name} cannot be used: {exc}") from exc
        except OSError as exc:
            raise InvalidRequest(f"loras: {name} cannot be read any more: {exc}") from exc

    def _open(self, path: Path) -> Mapping[tuple[str, str], LoraLayer]:
        """Return a file's layers.

        Raises:
            InvalidCheckpoint: it is no LoRA for single jobs of this model.
        """
        layers = read_layers(path, self._names, self._shapes)
        if beyond := [layer.label.removeprefix(f"{path}: ") for (part, name), layer in layers.items()
                      if name not in self.layout.layers[part]]:  # fmt: skip
            raise InvalidCheckpoint(
                f"{path} changes layers that only a merged LoRA can change: {some(beyond)}; single jobs have LoRAs for"
                " the linear layers and 1 × 1 convolutions of the UNet's transformers and for the text encoders: merge"
                " this one at the start (sdtpu_loras_merged)"
            )
        return layers

    def _combine(
        self, digest: bytes, loras: Sequence[_Lora], weights: Sequence[float], names: Sequence[str]
    ) -> JobAdapters:
        """Return LoRAs side by side along the rank, with their weights in `up`."""
        layout = self.layout
        stack = layout.zeros(leading=(1,))
        for part, places in layout.places.items():
            for parameter, (size, number) in places.items():
                first, matrices = 0, stack[part][size]
                for lora, weight in zip(loras, weights, strict=True):
                    if (part, parameter) not in lora.layers:
                        continue
                    down, up = lora.layers[part, parameter]
                    last = first + down.shape[1]
                    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is found below
                        matrices.down[0, number, :, first:last] = down
                        matrices.up[0, number, first:last] = np.float32(weight) * up
                    first = last
        if not all(np.isfinite(leaf).all() for each in stack.values() for pair in each.values() for leaf in pair):
            raise InvalidRequest(
                f"loras: {', '.join(names)} cannot be used: values are not finite (NaN or infinity) as"
                f" {np.dtype(layout.dtype).name} with the weights {', '.join(f'{weight:g}' for weight in weights)}"
            )
        return JobAdapters(np.frombuffer(digest, np.uint32).copy(), stack)


def _read(layers: Mapping[tuple[str, str], LoraLayer]) -> _Lora:
    """Read the matrices of a file."""
    digest, found, rank = hashlib.blake2b(digest_size=16), {}, 0
    for (part, name), layer in sorted(layers.items()):
        down, up = (tensor.read().astype(np.float32) for tensor in (layer.down, layer.up))
        its_rank = down.shape[0]
        down, up = down.reshape(its_rank, -1), np.float32(layer.scale) * up.reshape(-1, its_rank)
        if layer.mid is not None:  # of a 1 × 1 convolution, so one number for each pair of ranks
            up = up @ layer.mid.read().astype(np.float32).reshape(its_rank, its_rank)
        found[part, name] = down.T, up.T
        rank = max(rank, its_rank)
        digest.update(f"{part} {name} {down.shape} {up.shape}".encode() + down.tobytes() + up.tobytes())
    return _Lora(rank, digest.digest(), found)


class _Recent(Generic[Value]):
    """The values that were asked for last, made once each."""

    def __init__(self) -> None:
        self._values: OrderedDict[Any, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """Return the value for a key."""
        with self._lock:  # also while it is made: jobs with the same LoRAs come together, and wait for one reading
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            while len(self._values) > _KEPT:
                self._values.popitem(last=False)
            return self._values[key]
