"""Images and pictures in Redis, with the expiry of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdtpu_worker.errors import StorageError
from sdtpu_worker.images.names import foreign, picture_name, stored_name
from sdtpu_worker.images.pictures import MAX_PICTURE_BYTES
from sdtpu_worker.images.retry import PUT_BUDGET_S, never, try_patiently
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from redis import Redis

REDIS_URI_PREFIX = "redis:"
_KEY_PREFIX = "sdtpu:image:"


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
        key = _KEY_PREFIX + stored_name(task_id)
        self._patiently(
            lambda: self.client.set(key, data, ex=self.expires_s),
            f"Redis did not take the image of task {task_id!r} ({len(data):,} bytes)",
            give_up,
        )
        return REDIS_URI_PREFIX + key

    def put_picture(self, image_format: str, data: bytes) -> str:
        """Store a picture; see `PictureStore`."""
        key = _KEY_PREFIX + picture_name(data)

        def write() -> None:
            if self.expires_s is None:
                self.client.set(key, data, nx=True)
            elif not self.client.expire(key, self.expires_s):  # it is not there yet
                self.client.set(key, data, ex=self.expires_s)

        self._patiently(write, f"Redis did not take a picture of {len(data):,} bytes", never)
        return REDIS_URI_PREFIX + key

    def owns(self, uri: str) -> bool:
        """Return whether a URI is of this store; see `PictureStore`."""
        return uri.startswith(REDIS_URI_PREFIX + _KEY_PREFIX)

    def read_picture(self, uri: str, give_up: Callable[[], bool] = never) -> bytes | None:
        """Return a picture; see `PictureStore`."""
        key = uri.removeprefix(REDIS_URI_PREFIX)
        if not self.owns(uri):
            raise foreign(uri, f"{REDIS_URI_PREFIX}{_KEY_PREFIX}…")
        # No more than is taken leaves Redis, whatever the key holds; there are no empty pictures.
        data: Any = self._patiently(
            lambda: self.client.getrange(key, 0, MAX_PICTURE_BYTES), f"Redis could not be read for {uri}", give_up
        )
        return data.encode(errors="replace") if isinstance(data, str) else data or None

    def _patiently(self, attempt: Callable[[], Any], failure: str, give_up: Callable[[], bool]) -> Any:
        from redis import exceptions

        lasting = (
            exceptions.AuthenticationError,
            exceptions.AuthorizationError,
            exceptions.NoPermissionError,
            exceptions.DataError,
        )

        def may_pass(exc: Exception) -> bool:
            is_of_key = isinstance(exc, exceptions.ResponseError) and str(exc).startswith("WRONGTYPE")
            return isinstance(exc, exceptions.RedisError | OSError) and not isinstance(exc, lasting) and not is_of_key

        return try_patiently(attempt, failure, may_pass, self.budget_s, give_up)

    def uri_of(self, task_id: str, image_format: str) -> str:
        """Return the URI that `put` returns for this task and format."""
        return f"{REDIS_URI_PREFIX}{_KEY_PREFIX}{stored_name(task_id)}"

    def read(self, uri: str) -> bytes:
        """Return an encoded image; see `ImageStore`."""
        key = uri.removeprefix(REDIS_URI_PREFIX)
        if key == uri or not key.startswith(_KEY_PREFIX):
            raise foreign(uri, f"{REDIS_URI_PREFIX}{_KEY_PREFIX}…")
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
