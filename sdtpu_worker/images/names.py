"""Names in image stores, and the errors for a URI that is of no store and for a store that cannot be used."""

from __future__ import annotations

import hashlib
import re

from sdtpu_worker.errors import ConfigurationError, StorageError
from sdtpu_worker.redaction import sanitize_url

_SHOWN_CHARACTERS = 300  # of a URI in an error
_SAFE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")  # no capitals: file systems may take "A" for "a"


def stored_name(task_id: str) -> str:
    """Return the name of a task's image in a store: the task id if any store can use it as a name, else its hash.

    No two task ids have the same name: a hash begins with an underscore, and an id that is used as a name does not.
    """
    if _SAFE_ID.fullmatch(task_id):
        return task_id
    return "_" + hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()


def picture_name(data: bytes) -> str:
    """Return the name of a picture that a client stored: of its content, so that the same picture is stored once.

    It begins with an underscore, as no task's image does whose name is its id, and is longer than a hash.
    """
    return f"_picture-{hashlib.sha256(data).hexdigest()}"


def foreign(uri: str, wanted: str) -> StorageError:
    """Return the error for a URI that is not of the stores in the settings."""
    return StorageError(
        f"the image at {sanitize_url(uri[:_SHOWN_CHARACTERS])!r} is not in the configured store, which has"
        f" {sanitize_url(wanted)}; set sdtpu_image_store to the worker's value, or add the worker's store to"
        " sdtpu_read_image_stores"
    )


def unusable(url: str, exc: Exception, setting: str = "sdtpu_image_store") -> ConfigurationError:
    """Return the error for a URL that cannot be used; its cause is left out where it may quote a password."""
    cause = type(exc).__name__ + ("" if "@" in url else f": {exc}")
    return ConfigurationError(
        f"{setting} must be redis, a redis:// URL or a writable fsspec URL, got {sanitize_url(url)!r} ({cause})"
    )
