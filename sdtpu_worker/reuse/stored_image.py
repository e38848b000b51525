"""The image that a pointer leads to: read from the worker's own store, and used only if it is what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sdtpu_worker.contract.request import PICTURES
from sdtpu_worker.contract.result import BatchPlace
from sdtpu_worker.errors import StorageError
from sdtpu_worker.images.decode import decode_image
from sdtpu_worker.images.encode import encode_image
from sdtpu_worker.reuse.notes import Pointer


class ReadableStore(Protocol):
    """What reuse needs of an image store."""

    def uri_of(self, task_id: str, image_format: str) -> str:
        """Return the URI that the store gives to a task's image."""

    def read_picture(self, uri: str, give_up: Callable[[], bool]) -> bytes | None:
        """Return an image of the store, within bounds; None if it is gone; see `PictureStore`."""


@dataclass(frozen=True)
class Drawn:
    """An encoded image and what its result says of it besides the request.

    Attributes:
        data: the encoded image.
        nsfw: the safety checker's verdict; None without a checker.
        batch: the device and the slot that made it.
        reused: it was made for an earlier job.
    """

    data: bytes
    nsfw: bool | None
    batch: BatchPlace
    reused: bool = False


def read_stored(
    store: ReadableStore, pointer: Pointer, image_format: str, lane: tuple[int, int], text: Mapping[str, Any]
) -> Drawn | None:
    """Return the image of a pointer, as the job that asks would have stored it; None if it is not there or not this.

    One attempt is made to read it: where the store does not answer, the job runs. Of a PNG the text chunks say what it
    shows, and are compared; those that name the pictures which a job starts from are written anew where they differ.

    Args:
        store: the worker's own.
        pointer: from anybody.
        image_format: of the job that asks.
        lane: its size, `(height, width)` in pixels.
        text: the parameters that a PNG of it says.
    """
    height, width = lane
    try:
        data = store.read_picture(store.uri_of(pointer.task_id, image_format), _at_once)
        if data is None or not pointer.names(data):
            return None
        image = decode_image(data, image_format, width, height)
    except StorageError:
        return None
    if image_format == "png":
        wanted, found = {name: str(value) for name, value in text.items()}, getattr(image, "text", {})
        if _without_pictures(found) != _without_pictures(wanted):
            return None
        if found != wanted:
            import numpy as np

            data = encode_image(np.asarray(image), image_format, text)
    return Drawn(data, pointer.nsfw, pointer.batch, reused=True)


def _at_once() -> bool:
    """Give up after the first attempt."""
    return True


def _without_pictures(text: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in text.items() if name not in PICTURES}
