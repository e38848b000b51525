"""What LoRAs of single jobs are to the programs: which layers they may change, and how a bank of them lies in memory.

A bank has some entries on every device. An entry is what one combination of LoRAs adds to all layers that take one;
entry 0 adds nothing. Layers of the same size are stacked, since every array of a bank makes a dispatch slower: SD 1.5
has 264 such layers of 15 sizes. Pure functions of arrays, but for `JobAdapters`, which lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.models.layers import Adapter

Layers = Mapping[str, Mapping[str, tuple[int, int]]]
"""By part and name of the weight, what the layer makes of what: `(in, out)` features."""
Adapted = Mapping[str, Mapping[str, Adapter]]
"""By part and name of the weight, what is added to the layer."""


class Matrices(NamedTuple):
    """What is added to the layers of one size."""

    down: Any  # (…, layers, in, r)
    up: Any  # (…, layers, r, out)


Stack = Mapping[str, Mapping[str, Matrices]]
"""By part and size, such as `320x1280`, what is added to all layers that take an adapter."""


@dataclass(frozen=True)
class JobAdapters:
    """The LoRAs of a job, ready for a bank. Never changed: jobs with the same LoRAs share it.

    Attributes:
        digest: `(2,) uint32`, of their contents and weights.
        stack: host arrays, with an axis of length 1 first.
    """

    digest: np.ndarray
    stack: Stack = field(repr=False)

    @property
    def key(self) -> bytes:
        """What tells combinations apart."""
        return self.digest.tobytes()


def digest_of(adapters: JobAdapters | None) -> np.ndarray:
    """Return what a slot keeps to tell a job's LoRAs from others, `(2,) uint32`; zeros without any."""
    return np.zeros(2, np.uint32) if adapters is None else adapters.digest


@dataclass(frozen=True)
class AdapterLayout:
    """How adapters lie in a bank.

    Attributes:
        rank: of every layer's matrices; LoRAs of a smaller one are filled up with zeros.
        dtype: of the matrices.
        layers: those that take an adapter.
    """

    rank: int
    dtype: Any
    layers: Layers

    @cached_property
    def places(self) -> dict[str, dict[str, tuple[str, int]]]:
        """By part and name of the weight, the layer's size and its number among those of the size."""
        places: dict[str, dict[str, tuple[str, int]]] = {}
        for part, layers in self.layers.items():
            counts: dict[str, int] = {}
            places[part] = {}
            for name, (inner, outer) in layers.items():
                size = f"{inner}x{outer}"
                places[part][name] = size, counts.setdefault(size, 0)
                counts[size] += 1
        return places

    def shapes(self, leading: tuple[int, ...] = ()) -> dict[str, dict[str, Matrices]]:
        """Return shapes and dtypes of stacked matrices, with these axes before their own."""
        found: dict[str, dict[str, Matrices]] = {}
        for part, places in self.places.items():
            found[part] = {}
            for name, (size, number) in places.items():  # the last of a size has the highest number
                inner, outer = self.layers[part][name]
                down, up = (number + 1, inner, self.rank), (number + 1, self.rank, outer)
                found[part][size] = Matrices(
                    *(jax.ShapeDtypeStruct((*leading, *shape), self.dtype) for shape in (down, up))
                )
        return found

    def zeros(self, make: Callable[..., Any] = np.zeros, leading: tuple[int, ...] = ()) -> Any:
        """Return stacked matrices of zeros, as `make(shape, dtype)` makes them."""
        return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), self.shapes(leading))

    @cached_property
    def entry_bytes(self) -> int:
        """How many bytes an entry takes."""
        return bytes_per_device(self.shapes())

    def pick(self, bank: Stack, entries: Any, part: str) -> dict[str, Adapter]:
        """Return what is added to the layers of a part, for each row of a batch; can be traced.

        Args:
            bank: `(entries, layers, …)`, of one device.
            entries: `(B,) int32`, of the rows.
            part: whose layers.

        Returns:
            By name of the weight `(B, in, r)` and `(B, r, out)`.
        """
        picked = {size: Matrices(pair.down[entries], pair.up[entries]) for size, pair in bank[part].items()}
        return {
            name: (picked[size].down[:, number], picked[size].up[:, number])
            for name, (size, number) in self.places[part].items()
        }
