"""A result backend in this process' memory, for tests without Redis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery.backends.base import KeyValueStoreBackend


class MemoryBackend(KeyValueStoreBackend):
    """Keeps states and results in a dictionary.

    Args:
        app: the Celery app.
        on_read: called before each read of a key.
        make_redis: returns what stands for redis-py's asynchronous client, whose texts are kept here too.

    Attributes:
        is_in_this_process: no other process sees what it keeps.
    """

    is_in_this_process = True
    supports_autoexpire = True  # nothing lives longer than its test
    implements_incr = True
    thread_safe = True

    def __init__(self, app: Any, on_read: Callable[[bytes], None], make_redis: Callable[[MemoryBackend], Any]) -> None:
        super().__init__(app=app, url="memory://")
        self._on_read, self._redis = on_read, make_redis(self)
        self._values: dict[bytes, Any] = {}

    def store_result(self, task_id: str, result: Any, state: str, *rest: Any, **options: Any) -> Any:
        """Store a task's state; a job that was revoked or has expired stays so, as with a device worker."""
        before = self.get(self.get_key_for_task(task_id))
        if before is not None and self.decode(before)["status"] == "REVOKED":
            return result
        return super().store_result(task_id, result, state, *rest, **options)

    def make_async_client(self) -> Any:
        """Return what the jobs API uses in place of Redis; each call returns the same."""
        return self._redis

    def get(self, key: bytes | str) -> Any:
        """Return what is kept under a key, None for nothing."""
        self._on_read(_as_bytes(key))
        return self._values.get(_as_bytes(key))

    def mget(self, keys: Sequence[bytes | str]) -> list[Any]:
        """Return what is kept under some keys."""
        return [self.get(key) for key in keys]

    def set(self, key: bytes | str, value: Any) -> None:
        """Keep a value under a key."""
        self._values[_as_bytes(key)] = value

    def delete(self, key: bytes | str) -> None:
        """Forget a key."""
        self._values.pop(_as_bytes(key), None)

    def incr(self, key: bytes | str) -> int:
        """Count a key up; return its new value."""
        self._values[_as_bytes(key)] = int(self._values.get(_as_bytes(key), 0)) + 1
        return self._values[_as_bytes(key)]

    def expire(self, key: bytes | str, value: Any) -> None:
        """Let a key be: nothing lives longer than its test."""


def _as_bytes(key: bytes | str) -> bytes:
    return key.encode() if isinstance(key, str) else key
