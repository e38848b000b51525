"""How a message names a picture: the URI of one in the workers' image store, or a data URI that holds the picture.

A worker opens what lies in the stores of its settings, and nothing else, whatever a message says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

MAX_URI_CHARACTERS = 2048
DATA_URI = re.compile(r"data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/]+={0,2})")
_WANTED = (
    "a URI of a picture in the image store (`uri` of an earlier result's image), or a data URI"
    " (data:image/png;base64,…; png, jpeg or webp)"
)
_FILE_SUFFIX = re.compile(r".*\.(png|jpe?g|webp)", re.IGNORECASE)


def check_picture(name: str, value: Any) -> None:
    """Check that a value names a picture; an earlier job's result names its image.

    Raises:
        InvalidRequest: it does not.
    """
    if value is None:
        return
    uri = _uri_of(value)
    if uri is None:
        raise InvalidRequest(f"{name} must be {_WANTED}, or an earlier job's result, got {brief(value)}")
    if uri.startswith("data:"):
        if not DATA_URI.fullmatch(uri):
            raise InvalidRequest(f"{name} must be {_WANTED}, got a data URI of another kind: {brief(uri)}")
        return
    if ":" not in uri or any(character.isspace() or not character.isprintable() for character in uri):
        remedy = "; a file is named with pathlib.Path where the job is enqueued" if _FILE_SUFFIX.fullmatch(uri) else ""
        raise InvalidRequest(f"{name} must be {_WANTED}, got {brief(uri)}{remedy}")
    if len(uri) > MAX_URI_CHARACTERS:
        raise InvalidRequest(f"{name} must be a URI of at most {MAX_URI_CHARACTERS:,} characters, got {len(uri):,}")


def named_picture(value: Any) -> str:
    """Return the URI of a value that `check_picture` accepts."""
    uri = _uri_of(value)
    assert uri is not None
    return uri


def shown_picture(uri: str) -> str:
    """Return a reference as results report it: of a data URI the kind and a hash; any other text as it is."""
    if not uri.startswith("data:"):
        return uri
    return f"{uri.partition(',')[0]};sha256={hashlib.sha256(uri.encode()).hexdigest()}"


def is_result(value: Any) -> bool:
    """Return whether a value is an earlier job's result, as far as its image goes."""
    return isinstance(value, Mapping) and _uri_of(value) is not None


def _uri_of(value: Any) -> str | None:
    """Return the text that names a picture; of a result that of its image; None if there is none."""
    if isinstance(value, Mapping):
        image = value.get("image")
        value = image.get("uri") if isinstance(image, Mapping) else None
    return value if isinstance(value, str) else None
