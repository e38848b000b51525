"""Image stores: encoded images by task id, and pictures that clients bring, in Redis or below an fsspec URL.

An image's name in a store is made from the task id alone, and cannot leave the store's prefix. Others may be able to
write any URI into a result, so no store or path is ever made from that URI. It is compared with the URI that each store
in this process's settings gives to the task, and an image is read only where the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from sdtpu_worker.config import read_setting, result_expires_s
from sdtpu_worker.contract.result import GenerationResult, StoredImage
from sdtpu_worker.errors import ConfigurationError, StorageError
from sdtpu_worker.images.decode import decode_image, named_image
from sdtpu_worker.images.file_store import FileImageStore
from sdtpu_worker.images.names import foreign, unusable
from sdtpu_worker.images.redis_store import RedisImageStore
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery
    from PIL.Image import Image
    from redis import Redis

_CONNECT_TIMEOUT_S, _REPLY_TIMEOUT_S = 5.0, 10.0


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


class PictureStore(Protocol):
    """Where clients put pictures that jobs start from, and workers read them."""

    def put_picture(self, image_format: str, data: bytes) -> str:
        """Store a picture, unless it is there already, and return its URI.

        Args:
            image_format: png, jpeg or webp.
            data: the encoded picture.

        Raises:
            StorageError: the picture was not stored.
        """

    def owns(self, uri: str) -> bool:
        """Return whether a URI, from anybody, is of this store; nothing is read, and nothing is built from it."""

    def read_picture(self, uri: str, give_up: Callable[[], bool] = ...) -> bytes | None:
        """Return the first bytes of a picture, or of an image; one byte more than `MAX_PICTURE_BYTES` at most.

        Args:
            uri: of this store.
            give_up: asked several times a second while the store does not answer; True ends the attempts.

        Returns:
            None if it is gone: it expired or was deleted.

        Raises:
            StorageError: the URI is not of this store, or the store cannot be read.
        """


def find_store(app: Celery, budget_s: float) -> PictureStore:
    """Return the store of `sdtpu_image_store`, for a client that puts a picture there.

    Args:
        app: the app with the setting and the result backend.
        budget_s: seconds for which the store is asked again.

    Raises:
        ConfigurationError: the setting cannot be used.
    """
    store = _find_store(app, read_setting("sdtpu_image_store", app.conf))
    store.budget_s = budget_s
    return store


def further_stores(app: Celery) -> list[PictureStore]:
    """Return the stores of `sdtpu_read_image_stores`.

    Raises:
        ConfigurationError: the setting cannot be used.
    """
    urls = read_setting("sdtpu_read_image_stores", app.conf)
    return [_find_store(app, url, "sdtpu_read_image_stores") for url in urls]


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
    raise missing or unusable or foreign(image.uri, " or ".join(places))


def _find_store(app: Celery, url: str, setting: str = "sdtpu_image_store") -> RedisImageStore | FileImageStore:
    """Return the store at a URL; it is not asked yet whether it answers."""
    expires_s = result_expires_s(app.conf)
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
        raise unusable(url, exc, setting) from None
    return RedisImageStore(client, expires_s)


def _backend_client(app: Celery) -> Redis:
    from celery.backends.redis import RedisBackend

    if not isinstance(app.backend, RedisBackend):
        raise ConfigurationError(
            "sdtpu_image_store = 'redis' needs a Redis result backend, got"
            f" {sanitize_url(repr(app.conf.result_backend))}; set result_backend to redis://…, or sdtpu_image_store to"
            " a redis:// or fsspec URL"
        )
    return app.backend.client
