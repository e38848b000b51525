"""A checkpoint whose weights are read while its programs are loaded or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from sdtpu_worker.diffusion.background import Background
from sdtpu_worker.diffusion.checkpoint import Checkpoint


class LoadingCheckpoint:
    """A checkpoint whose configs are read, and whose weights a thread reads from now on. Any thread may ask.

    Args:
        outline: the checkpoint with shapes in place of arrays.
        read: returns it with arrays; calls its argument before each tensor, which raises `Cancelled` at the end.

    Attributes:
        outline: as given; what was merged into the parameters is not known in it.
    """

    def __init__(self, outline: Checkpoint, read: Callable[[Callable[[], None]], Checkpoint]) -> None:
        self.outline = outline
        self._whole = Background(read, name="sdtpu-weights")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._whole.cancel()

    def wait(self) -> Checkpoint:
        """Return the checkpoint with its weights, when they are read.

        Raises:
            InvalidCheckpoint: a part is broken, or a LoRA does not fit.
            Cancelled: this object was closed before.
        """
        return self._whole.result()

    def check(self) -> None:
        """Return at once, if reading has not failed.

        Raises:
            InvalidCheckpoint: as for `wait`.
        """
        self._whole.check()
