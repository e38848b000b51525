"""Which choices count while a program is traced: layers ask here, whoever traces the program says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.models.image_kernel_table import convolution_block, projection_block_pixels, sums_block_pixels
from sdtpu_worker.models.kernel_table import (
    AUTO,
    SMALL_TPU,
    TABLE,
    Choice,
    Implementation,
    Row,
    Shape,
    choose,
    dense_block_rows,
    key_block_rows,
)


@dataclass(frozen=True)
class Selection:
    """How attentions are chosen in one program, and what was chosen for it.

    Attributes:
        platform: of the devices that it is compiled for, as `kernel_table.kernel_platform` calls it.
        wanted: the setting `sdtpu_attention`.
        interpret: kernels run in JAX's interpreter, so that they can be tried on the CPU.
        table: the rows that are chosen from.
        dense_block_rows: the same for the dense layers after an attention.
        key_block_rows: the same for keys and values before one.
        convolution_block: the same for convolutions.
        sums_block_pixels: the same for the sums of group norms.
        projection_block_pixels: the same for the projections behind transformers.
        chosen: by shape, what layers were told; it grows while the program is traced.
    """

    platform: str
    wanted: str = AUTO
    interpret: bool = False
    table: Sequence[Row] = TABLE
    dense_block_rows: Callable[[str, str, int, int, Any], int] = dense_block_rows
    key_block_rows: Callable[..., int] = key_block_rows
    convolution_block: Callable[..., tuple[int, int] | None] = convolution_block
    sums_block_pixels: Callable[..., int] = sums_block_pixels
    projection_block_pixels: Callable[..., int] = projection_block_pixels
    chosen: dict[Shape, Choice] = field(default_factory=dict)

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs, with kernels or without."""
        return self.platform in ("tpu", SMALL_TPU)

    def choose(self, shape: Shape) -> Choice:
        """Return the choice for a shape, and remember it."""
        return self.chosen.setdefault(shape, choose(self.platform, self.wanted, shape, self.table))

    def counts_keys(self, shape: Shape) -> bool:
        """Return whether attentions of a shape are given all keys that a row may have, and how many of them count."""
        return choose(self.platform, self.wanted, shape, self.table).counts_keys


_PLAIN = Selection("cpu", Implementation.PLAIN)
_current: ContextVar[Selection] = ContextVar("attention selection", default=_PLAIN)


def current_selection() -> Selection:
    """Return the selection that counts now; the plain one where nobody said another."""
    return _current.get()


@contextmanager
def selecting(selection: Selection) -> Iterator[Selection]:
    """Let a selection count for what is traced inside the `with`."""
    token = _current.set(selection)
    try:
        yield selection
    finally:
        _current.reset(token)
