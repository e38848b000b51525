"""Pictures that a client brings: put into the image store where the job is enqueued, so that messages stay small."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtpu_worker.contract.picture_reference import DATA_URI
from sdtpu_worker.contract.request import LISTED, PICTURES
from sdtpu_worker.errors import ConfigurationError, InvalidRequest, StorageError
from sdtpu_worker.images.pictures import MAX_PICTURE_BYTES, check_picture_bytes
from sdtpu_worker.images.store import find_store

if TYPE_CHECKING:
    from celery import Celery

_BUDGET_S = 3.0
"""Seconds for which a client tries to store a picture: whoever waits for it is a person."""


def bring_pictures(app: Celery, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's parameters with URIs in place of pictures; a picture that is brought is stored under its content.

    Args:
        app: the app with the settings and the result backend.
        parameters: a picture may be bytes, a PIL image, a path (`pathlib.Path`) or a data URI; what names a stored
            picture stays as it is. A string is never taken for a path: it may come from a form on a web page.

    Raises:
        InvalidRequest: a picture cannot be used.
        StorageError: a picture could not be stored.
    """
    found = dict(parameters)
    for name in PICTURES:
        given = found.get(name)
        if name in LISTED and isinstance(given, list | tuple):
            found[name] = [_bring(app, name, each) for each in given]
        elif given is not None:
            found[name] = _bring(app, name, given)
    return found


def _bring(app: Celery, name: str, given: Any) -> Any:
    """Return the URI of a picture that is brought; anything else as it is."""
    data = _bytes_of(name, given)
    if data is None:
        return given
    image_format = check_picture_bytes(name, data)
    try:
        return find_store(app, _BUDGET_S).put_picture(image_format, data)
    except ConfigurationError as exc:
        raise StorageError(f"{name} could not be stored: {exc}") from exc


def data_of_uri(name: str, uri: str) -> bytes:
    """Return the bytes in a data URI.

    Raises:
        InvalidRequest: they are not base64 of a picture.
    """
    match = DATA_URI.fullmatch(uri)
    try:
        return base64.b64decode(match[2], validate=True) if match else b""
    except binascii.Error as exc:
        raise InvalidRequest(f"{name} must be a data URI in base64, got one that is cut: {exc}") from exc


def _bytes_of(name: str, value: Any) -> bytes | None:
    """Return a picture's encoded bytes; None for what is no picture but names one, or is checked elsewhere."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return _read(name, Path(value))
    if isinstance(value, str) and DATA_URI.fullmatch(value):
        return data_of_uri(name, value)
    if not hasattr(value, "save") or not hasattr(value, "getbands"):
        return None
    buffer = io.BytesIO()
    try:
        picture = value if value.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else value.convert("RGB")
        picture.save(buffer, "png", compress_level=1)
    except Exception as exc:  # an image that was opened lazily fails in as many ways as there are formats
        raise InvalidRequest(f"{name} must be a whole picture, got one that cannot be read: {exc}") from exc
    return buffer.getvalue()


def _read(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PICTURE_BYTES + 1)
    except OSError as exc:
        raise InvalidRequest(f"{name} must be a file that can be read, got {path}: {exc.strerror}") from exc
