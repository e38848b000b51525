"""A job's pictures on the worker: opened in the stores of its settings, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sdtpu_worker.contract.request import LISTED, PICTURES, GenerationRequest
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.images.bring import data_of_uri
from sdtpu_worker.images.pictures import decode_mask, decode_picture
from sdtpu_worker.images.retry import never
from sdtpu_worker.images.store import PictureStore
from sdtpu_worker.redaction import brief, sanitize_url

if TYPE_CHECKING:
    from PIL.Image import Image


class PictureOpener:
    """Opens the pictures that requests name. Any thread.

    Args:
        stores: those of the settings.
        give_up: asked while a store does not answer: whether to stop trying.
    """

    def __init__(self, stores: Sequence[PictureStore], give_up: Callable[[], bool] = never) -> None:
        self._stores, self._give_up = stores, give_up

    def open(self, request: GenerationRequest) -> dict[str, Image | list[Image]]:
        """Return a request's pictures by parameter, decoded: images in RGB, masks of mode `1`; a list of `LISTED` ones.

        Raises:
            InvalidRequest: a picture is not in these stores, is gone, or is none that is taken.
            StorageError: the store cannot be read.
        """
        found: dict[str, Image | list[Image]] = {}
        for name in PICTURES:
            named = getattr(request, name)
            if named is None:
                continue
            decode = decode_mask if name == "mask_image" else decode_picture
            if name in LISTED:
                found[name] = [decode(name, self._read(name, uri)) for uri in named]
            else:
                found[name] = decode(name, self._read(name, named))
        return found

    def _read(self, name: str, uri: str) -> bytes:
        if uri.startswith("data:"):
            return data_of_uri(name, uri)
        store = next((store for store in self._stores if store.owns(uri)), None)
        if store is None:
            raise InvalidRequest(
                f"{name} must be in a store of this worker (sdtpu_image_store, sdtpu_read_image_stores), which opens"
                f" nothing else, got {brief(sanitize_url(uri))}"
            )
        data = store.read_picture(uri, self._give_up)
        if data is None:
            raise InvalidRequest(
                f"{name} must be a stored picture, got {brief(sanitize_url(uri))}, which expired (result_expires) or"
                " was deleted; send it again"
            )
        return data
