"""Image stores: encoded images by task id, in Redis with the expiry of the results, or below an fsspec URL.

An image's name in a store is made from the task id alone, and cannot leave the store's prefix. Others may be able to
write any URI into a result, so no store or path is ever made from that URI. It is compared with the URI that each store
in this process's settings gives to the task, and an image is read only where the two are equal.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdtpu_worker.contract.result import GenerationResult, StoredImage
from sdtpu_worker.errors import ConfigurationError, StorageError
from sdtpu_worker.images.decode import decode_image, named_image
from sdtpu_worker.images.local_files import make_folder_durably, write_durably
from sdtpu_worker.images.retry import PUT_BUDGET_S, never, store_patiently
from sdtpu_worker.images.writable import make_writable, type_options
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery
    from PIL.Image import Image
    from redis import Redis

REDIS_URI_PREFIX = "redis:"
_KEY_PREFIX = "sdtpu:image:"
_SHOWN_CHARACTERS = 300  # of a URI in an error
_CONNECT_TIMEOUT_S, _REPLY_TIMEOUT_S = 5.0, 10.0
_SAFE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")  # no capitals: file systems may take "A" for "a"
_STORED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # no separator, no "..", no hidden name


class ImageStore(Protocol):
    """Where a worker stores encoded images."""

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool] = ...) -> str:
        """Store an image and return its URI; an image that the task has already is replaced.

        If the store does not answer or is full, the write is tried again for `PUT_BUDGET_S` seconds. An error that
        cannot pass by itself (no permission, a wrong password) ends it at once.

        Args:
            task_id: the id of the job's task, which names the image.
            image_format: png, jpeg or webp.
            data: the encoded image.
            give_up: asked several times a second during a pause; True ends the attempts.

        Raises:
            StorageError: the image was not stored.
        """

    def read(self, uri: str) -> bytes:
        """Return the encoded image at a URI that `put` returned.

        Raises:
            StorageError: the URI is not one of this store, the image is gone, or the store cannot be read.
        """


class RedisImageStore:
    """Stores images in Redis, under `sdtpu:image:{name}`, with the expiry of the results.

    One attempt takes as long as the client's time-outs allow. The result backend's client has Celery's
    `redis_socket_timeout` (120 s by default), and does not try again by itself.

    Args:
        client: a client of the Redis.
        expires_s: seconds after which an image expires; None for never.
        budget_s: seconds for which `put` tries again.
    """

    def __init__(self, client: Redis, expires_s: int | None, budget_s: float = PUT_BUDGET_S) -> None:
        self.client, self.expires_s, self.budget_s = client, expires_s, budget_s

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool] = never) -> str:
        """Store an image; see `ImageStore`."""
        from redis.exceptions import AuthenticationError, AuthorizationError, DataError, NoPermissionError, RedisError

        key = _KEY_PREFIX + stored_name(task_id)
        lasting = (AuthenticationError, AuthorizationError, NoPermissionError, DataError)
        store_patiently(
            lambda: self.client.set(key, data, ex=self.expires_s),
            f"Redis did not take the image of task {task_id!r} ({len(data):,} bytes)",
            lambda exc: isinstance(exc, RedisError | OSError) and not isinstance(exc, lasting),
            self.budget_s,
            give_up,
        )
        return REDIS_URI_PREFIX + key

    def uri_of(self, task_id: str, image_format: str) -> str:
        """Return the URI that `put` returns for this task and format."""
        return f"{REDIS_URI_PREFIX}{_KEY_PREFIX}{stored_name(task_id)}"

    def read(self, uri: str) -> bytes:
        """Return an encoded image; see `ImageStore`."""
        key = uri.removeprefix(REDIS_URI_PREFIX)
        if key == uri or not key.startswith(_KEY_PREFIX):
            raise _foreign(uri, f"{REDIS_URI_PREFIX}{_KEY_PREFIX}…")
        try:
            data: Any = self.client.get(key)
        except Exception as exc:  # redis-py's and the system's errors, and a TypeError for an unknown option in the URL
            raise StorageError(f"Redis could not be read for {uri}: {sanitize_url(str(exc))}") from exc
        if data is None:
            raise StorageError(f"no image at {uri}: it expired (result_expires) or was deleted")
        if not isinstance(data, bytes):
            raise StorageError(
                f"Redis returned text for {uri} instead of bytes; remove decode_responses from the store's URL"
            )
        return data


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
            raise _unusable(url, exc, setting) from None
        self.fs, self.root, self._is_local = fs, root.rstrip("/"), "file" in fs.protocol
        self._prefix: str = fs.unstrip_protocol(f"{self.root}/_").removesuffix("_")

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool] = never) -> str:
        """Store an image; see `ImageStore`."""
        name = f"{stored_name(task_id)}.{image_format}"
        store_patiently(
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
            raise _foreign(uri, f"{self._prefix}…")
        try:
            return bytes(self.fs.cat_file(f"{self.root}/{name}"))
        except Exception as exc:  # every file system of fsspec has its own errors
            raise StorageError(f"no image at {sanitize_url(uri)}: {sanitize_url(str(exc))}") from exc

    def prepare(self) -> None:
        """Make the folder of the images, if it does not exist, and prove that images can be written there.

        Raises:
            ConfigurationError: nothing can be written there, or other processes could not read it.
        """
        try:
            make_writable(self.fs, self.root, self._make_root, self._write)
        except Exception as exc:  # every file system of fsspec has its own errors
            raise _unusable(self._prefix, exc) from None

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


def stored_name(task_id: str) -> str:
    """Return the name of a task's image in a store: the task id if any store can use it as a name, else its hash.

    No two task ids have the same name: a hash begins with an underscore, and an id that is used as a name does not.
    """
    if _SAFE_ID.fullmatch(task_id):
        return task_id
    return "_" + hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()


def make_image_store(app: Celery, url: str) -> ImageStore:
    """Return the store to which a worker writes, after making its folder.

    Args:
        app: the app, for its result backend and `result_expires`.
        url: `sdtpu_image_store`.

    Raises:
        ConfigurationError: the URL cannot be used, or it is `redis` and the result backend is not Redis.
    """
    store = _find_store(app, url)
    if isinstance(store, FileImageStore):
        store.prepare()
    return store


def read_image_bytes(result: Mapping[str, Any] | GenerationResult, app: Celery | None = None) -> bytes:
    """Return the encoded image of a result.

    It is read from the store in `sdtpu_image_store` or, where the result says so, from one in
    `sdtpu_read_image_stores`. Only the image of the result's own task is read.

    Args:
        result: what `AsyncResult.get()` returned, or a `GenerationResult`.
        app: the app with the settings and the result backend; None for the current Celery app.

    Raises:
        StorageError: `result` is not a result of `sdtpu.generate`, or its image is in none of these stores, is gone, or
            cannot be read. No other exception is raised, whatever the result holds; a setting that cannot be used is a
            StorageError too, whose cause is the ConfigurationError that names the setting.
    """
    task_id, image = named_image(result)
    try:
        from celery import current_app

        return _read_from_own_stores(app or current_app._get_current_object(), task_id, image)
    except StorageError:
        raise
    except Exception as exc:
        raise StorageError(f"the image stores of this process cannot be read: {sanitize_url(str(exc))}") from exc


def open_image(result: Mapping[str, Any] | GenerationResult, app: Celery | None = None) -> Image:
    """Return the decoded image of a result; the arguments are those of `read_image_bytes`.

    Raises:
        StorageError: as for `read_image_bytes`; also if the stored data have another format or size than the result
            says, which is found before pixels are decoded, or are damaged.
    """
    _, image = named_image(result)
    return decode_image(read_image_bytes(result, app), image.format, image.width, image.height)


def _read_from_own_stores(app: Celery, task_id: str, image: StoredImage) -> bytes:
    """Read an image from the first store in the settings that gives the task this URI and has the image.

    Raises:
        StorageError: no store has the image; the error of a store that should have it comes first.
        ConfigurationError: no store has the image, and one store cannot be used.
    """
    from sdtpu_worker.config import read_setting

    settings = [("sdtpu_image_store", read_setting("sdtpu_image_store", app.conf))]
    settings += [("sdtpu_read_image_stores", url) for url in read_setting("sdtpu_read_image_stores", app.conf)]
    places: list[str] = []
    missing: StorageError | None = None
    unusable: ConfigurationError | None = None
    for setting, url in settings:
        try:
            store = _find_store(app, url, setting)
            places.append(store.uri_of(task_id, image.format))
            if places[-1] == image.uri:
                return store.read(image.uri)
        except StorageError as exc:
            missing = missing or exc
        except ConfigurationError as exc:
            unusable = unusable or exc
    raise missing or unusable or _foreign(image.uri, " or ".join(places))


def _find_store(app: Celery, url: str, setting: str = "sdtpu_image_store") -> RedisImageStore | FileImageStore:
    """Return the store at a URL; it is not asked yet whether it answers."""
    expires = app.conf.result_expires
    expires_s = int(getattr(expires, "total_seconds", lambda: expires or 0)()) or None
    if url == "redis":
        return RedisImageStore(_backend_client(app), expires_s)
    if not url.startswith(("redis://", "rediss://", "unix://")):
        return FileImageStore(url, setting=setting)
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:  # its own ten retries would not ask whether to give up
        client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 1),
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_REPLY_TIMEOUT_S,
        )
    except ValueError as exc:
        raise _unusable(url, exc, setting) from None
    return RedisImageStore(client, expires_s)


def _foreign(uri: str, wanted: str) -> StorageError:
    return StorageError(
        f"the image at {sanitize_url(uri[:_SHOWN_CHARACTERS])!r} is not in the configured store, which has"
        f" {sanitize_url(wanted)}; set sdtpu_image_store to the worker's value, or add the worker's store to"
        " sdtpu_read_image_stores"
    )


def _unusable(url: str, exc: Exception, setting: str = "sdtpu_image_store") -> ConfigurationError:
    """Return the error for a URL that cannot be used; its cause is left out where it may quote a password."""
    cause = type(exc).__name__ + ("" if "@" in url else f": {exc}")
    return ConfigurationError(
        f"{setting} must be redis, a redis:// URL or a writable fsspec URL, got {sanitize_url(url)!r} ({cause})"
    )


def _backend_client(app: Celery) -> Redis:
    from celery.backends.redis import RedisBackend

    if not isinstance(app.backend, RedisBackend):
        raise ConfigurationError(
            "sdtpu_image_store = 'redis' needs a Redis result backend, got"
            f" {sanitize_url(repr(app.conf.result_backend))}; set result_backend to redis://…, or sdtpu_image_store to"
            " a redis:// or fsspec URL"
        )
    return app.backend.client
