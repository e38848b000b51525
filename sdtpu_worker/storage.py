"""Image bytes by task id: in Redis, with the result's expiry, or at any fsspec URL."""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdtpu_worker.errors import ConfigurationError, StorageError
from sdtpu_worker.result import GenerationResult

if TYPE_CHECKING:
    from celery import Celery
    from PIL.Image import Image
    from redis import Redis

REDIS_URI_PREFIX = "redis:"
_KEY_PREFIX = "sdtpu:image:"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class ImageStore(Protocol):
    """Where a worker puts image bytes."""

    def put(self, task_id: str, image_format: str, data: bytes) -> str:
        """Store the bytes and return their URI; storing the same id again replaces them.

        Raises:
            StorageError: the store refused them.
        """


class RedisImageStore:
    """Images under `sdtpu:image:{task_id}`, expiring with the results."""

    def __init__(self, client: Redis, expires_s: int | None) -> None:
        self.client, self.expires_s = client, expires_s

    def put(self, task_id: str, image_format: str, data: bytes) -> str:
        """Store the bytes; see `ImageStore`."""
        from redis.exceptions import RedisError

        key = _KEY_PREFIX + task_id
        try:
            self.client.set(key, data, ex=self.expires_s)
        except RedisError as exc:
            raise StorageError(f"Redis did not take the image of task {task_id} ({len(data):,} bytes): {exc}") from exc
        return REDIS_URI_PREFIX + key


class FileImageStore:
    """Images as `{task_id}.{format}` below an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
            self.fs.makedirs(self.root, exist_ok=True)
        except (ImportError, ValueError, OSError) as exc:
            raise ConfigurationError(
                f"sdtpu_image_store must be redis, a redis:// URL or a writable fsspec URL, got {url!r}: {exc}"
            ) from exc

    def put(self, task_id: str, image_format: str, data: bytes) -> str:
        """Store the bytes; see `ImageStore`."""
        safe = _SAFE_NAME.fullmatch(task_id) is not None
        name = task_id if safe else hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()
        path = f"{self.root.rstrip('/')}/{name}.{image_format}"
        try:
            if "file" in self.fs.protocol:
                _write_local_atomically(path, data)
            else:  # object stores show an object only when it is complete
                with self.fs.open(path, "wb") as file:
                    file.write(data)
        except OSError as exc:
            raise StorageError(f"the image of task {task_id} could not be written to {path}: {exc}") from exc
        return self.fs.unstrip_protocol(path)


def make_image_store(app: Celery, url: str) -> ImageStore:
    """Return the store that `sdtpu_image_store` names.

    Raises:
        ConfigurationError: the URL cannot be used, or `redis` was asked for and the result backend is not Redis.
    """
    expires = app.conf.result_expires
    expires_s = int(getattr(expires, "total_seconds", lambda: expires or 0)()) or None
    if url == "redis":
        return RedisImageStore(_backend_client(app), expires_s)
    if url.startswith(("redis://", "rediss://", "unix://")):
        from redis import Redis

        return RedisImageStore(Redis.from_url(url), expires_s)
    return FileImageStore(url)


def read_image_bytes(result: Mapping[str, Any] | GenerationResult, app: Celery | None = None) -> bytes:
    """Return the stored bytes of a result's image.

    Args:
        result: what `AsyncResult.get()` returned, or a `GenerationResult`.
        app: whose Redis to read; default: the current Celery app.

    Raises:
        StorageError: the image is not there any more, or the store cannot be read.
    """
    image = (result if isinstance(result, GenerationResult) else GenerationResult.from_json(result)).image
    if not image.uri.startswith(REDIS_URI_PREFIX):
        import fsspec

        try:
            with fsspec.open(image.uri, "rb") as file:
                return bytes(file.read())
        except OSError as exc:
            raise StorageError(f"no image at {image.uri}: {exc}") from exc
    from celery import current_app
    from redis.exceptions import RedisError

    from sdtpu_worker.config import read_setting

    app = app or current_app._get_current_object()
    store = make_image_store(app, read_setting("sdtpu_image_store", app.conf))
    client = store.client if isinstance(store, RedisImageStore) else _backend_client(app)
    try:
        data: Any = client.get(image.uri.removeprefix(REDIS_URI_PREFIX))
    except RedisError as exc:
        raise StorageError(f"Redis could not be read for {image.uri}: {exc}") from exc
    if data is None:
        raise StorageError(f"no image at {image.uri}: it expired (result_expires) or was deleted")
    return data


def open_image(result: Mapping[str, Any] | GenerationResult, app: Celery | None = None) -> Image:
    """Return a result's image, read and decoded; arguments and errors as for `read_image_bytes`."""
    from PIL import Image

    image = Image.open(io.BytesIO(read_image_bytes(result, app)))
    image.load()
    return image


def _write_local_atomically(path: str, data: bytes) -> None:
    """Write next to the target and rename, so that a reader never sees half an image."""
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _backend_client(app: Celery) -> Redis:
    from celery.backends.redis import RedisBackend

    if not isinstance(app.backend, RedisBackend):
        raise ConfigurationError(
            f"sdtpu_image_store = 'redis' needs a Redis result backend, got {app.conf.result_backend!r};"
            " set result_backend to redis://…, or sdtpu_image_store to a redis:// or fsspec URL"
        )
    return app.backend.client
