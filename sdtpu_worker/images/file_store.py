"""Images and pictures as files, in a local folder or in any file system of fsspec."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sdtpu_worker.errors import ConfigurationError, StorageError
from sdtpu_worker.images.local_files import make_folder_durably, read_plainly, write_durably
from sdtpu_worker.images.names import foreign, picture_name, stored_name, unusable
from sdtpu_worker.images.pictures import MAX_PICTURE_BYTES
from sdtpu_worker.images.retry import PUT_BUDGET_S, never, try_patiently
from sdtpu_worker.images.writable import make_writable, type_options
from sdtpu_worker.redaction import sanitize_url

_STORED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # no separator, no "..", no hidden name


class FileImageStore:
    """Stores images as files `{name}.{format}` below an fsspec URL.

    A chained URL (`simplecache::s3://…`) is refused: the layers that fsspec puts before a store keep old copies, are
    read-only, or write to the local disk.

    Args:
        url: a URL from the settings; never one from a result or a message.
        budget_s: seconds for which `put` tries again.
        setting: the name of the setting with the URL, for the texts of errors.

    Raises:
        ConfigurationError: the URL cannot be used.
    """

    def __init__(self, url: str, budget_s: float = PUT_BUDGET_S, setting: str = "sdtpu_image_store") -> None:
        import fsspec

        self.budget_s = budget_s
        if "::" in url:
            raise ConfigurationError(
                f"{setting} must not be a chained URL (with ::), got {sanitize_url(url)!r}; name the store itself"
            )
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except Exception as exc:  # every file system of fsspec has its own errors
            raise unusable(url, exc, setting) from None
        self.fs, self.root, self._is_local = fs, root.rstrip("/"), "file" in fs.protocol
        self._prefix: str = fs.unstrip_protocol(f"{self.root}/_").removesuffix("_")

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool] = never) -> str:
        """Store an image; see `ImageStore`."""
        name = f"{stored_name(task_id)}.{image_format}"
        try_patiently(
            lambda: self._write(f"{self.root}/{name}", data),
            f"the image of task {task_id!r} could not be written to {sanitize_url(self._prefix + name)}",
            lambda exc: not isinstance(exc, PermissionError | NotADirectoryError | IsADirectoryError),
            self.budget_s,
            give_up,
        )
        return self._prefix + name

    def uri_of(self, task_id: str, image_format: str) -> str:
        """Return the URI that `put` returns for this task and format."""
        return f"{self._prefix}{stored_name(task_id)}.{image_format}"

    def read(self, uri: str) -> bytes:
        """Return an encoded image; see `ImageStore`."""
        name = uri.removeprefix(self._prefix)
        if name == uri or not _STORED_NAME.fullmatch(name):
            raise foreign(uri, f"{self._prefix}…")
        try:
            return self._read(name, None)
        except Exception as exc:  # every file system of fsspec has its own errors
            raise StorageError(f"no image at {sanitize_url(uri)}: {sanitize_url(str(exc))}") from exc

    def put_picture(self, image_format: str, data: bytes) -> str:
        """Store a picture; see `PictureStore`."""
        name = f"{picture_name(data)}.{image_format}"
        try_patiently(
            lambda: None if self.fs.exists(f"{self.root}/{name}") else self._write(f"{self.root}/{name}", data),
            f"a picture could not be written to {sanitize_url(self._prefix + name)}",
            lambda exc: not isinstance(exc, PermissionError | NotADirectoryError | IsADirectoryError),
            self.budget_s,
            never,
        )
        return self._prefix + name

    def owns(self, uri: str) -> bool:
        """Return whether a URI is of this store; see `PictureStore`."""
        return uri.startswith(self._prefix) and bool(_STORED_NAME.fullmatch(uri.removeprefix(self._prefix)))

    def read_picture(self, uri: str, give_up: Callable[[], bool] = never) -> bytes | None:
        """Return a picture; see `PictureStore`."""
        if not self.owns(uri):
            raise foreign(uri, f"{self._prefix}…")

        def read() -> bytes | None:
            try:
                return self._read(uri.removeprefix(self._prefix), MAX_PICTURE_BYTES + 1)
            except FileNotFoundError:
                return None

        return try_patiently(
            read,
            f"{sanitize_url(uri)} could not be read",
            lambda exc: not isinstance(exc, PermissionError | NotADirectoryError | IsADirectoryError | StorageError),
            self.budget_s,
            give_up,
        )

    def _read(self, name: str, most: int | None) -> bytes:
        """Return what a file holds, its first `most` bytes; a link is not followed, it may lead out of the store."""
        path = f"{self.root}/{name}"
        if self._is_local:
            return read_plainly(Path(path), most)
        return bytes(self.fs.cat_file(path) if most is None else self.fs.cat_file(path, start=0, end=most))

    def prepare(self) -> None:
        """Make the folder of the images, if it does not exist, and prove that images can be written there.

        Raises:
            ConfigurationError: nothing can be written there, or other processes could not read it.
        """
        try:
            make_writable(self.fs, self.root, self._make_root, self._write)
        except Exception as exc:  # every file system of fsspec has its own errors
            raise unusable(self._prefix, exc) from None

    def _make_root(self) -> None:
        if self._is_local:
            make_folder_durably(Path(self.root))
        else:
            self.fs.makedirs(self.root, exist_ok=True)

    def _write(self, path: str, data: bytes) -> None:
        try:
            if self._is_local:
                write_durably(Path(path), data)
            else:  # object stores show an object only when it is complete
                self.fs.pipe_file(path, data, **type_options(self.fs, path))
        except FileNotFoundError:  # the folder was removed: make it, and have the write tried again
            self._make_root()
            raise
