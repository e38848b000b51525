"""What the jobs API asks of Redis, in this process' memory: for tests of a web app that has the jobs API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdtpu_worker.testing.memory_backend import MemoryBackend


class MemoryRedis:
    """Does what redis-py's asynchronous client does, for the commands of the jobs API. Nothing expires.

    Args:
        backend: keeps the texts, beside the states of jobs.
    """

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend, self._sets = backend, dict[str, dict[str, float]]()
        self.connection_pool = self

    async def ping(self) -> bool:
        """Answer."""
        return True

    async def aclose(self) -> None:
        """Let be: there is no connection."""

    async def disconnect(self) -> None:
        """Let be: there is no connection."""

    async def get(self, name: str) -> bytes | None:
        """Return a text."""
        return self._text(name)

    async def mget(self, names: Sequence[str | bytes]) -> list[bytes | None]:
        """Return some texts."""
        return [self._text(name) for name in names]

    async def set(self, name: str, value: str, nx: bool = False, ex: int | None = None) -> bool:
        """Keep a text; with `nx` only where there is none."""
        if nx and self._backend.get(name) is not None:
            return False
        self._backend.set(name, value)
        return True

    async def delete(self, *names: str) -> None:
        """Forget some texts."""
        for name in names:
            self._backend.delete(name)

    async def expire(self, name: str, seconds: int) -> None:
        """Let be."""

    async def persist(self, name: str) -> None:
        """Let be."""

    async def zadd(self, name: str, scores: Mapping[str, float], xx: bool = False) -> None:
        """Put members into a sorted set; with `xx` only those that are in it."""
        kept = self._sets.setdefault(name, {})
        kept.update({member: score for member, score in scores.items() if not xx or member in kept})

    async def zrem(self, name: str, *members: str) -> None:
        """Take members out of a sorted set."""
        for member in members:
            self._sets.get(name, {}).pop(member, None)

    async def zcard(self, name: str) -> int:
        """Return the size of a sorted set."""
        return len(self._sets.get(name, {}))

    async def zrange(self, name: str, start: int, end: int) -> list[bytes]:
        """Return all members, the lowest score first: nobody asks for less."""
        return self._members(name, lambda score: True)

    async def zrangebyscore(self, name: str, low: Any, high: Any, start: int, num: int) -> list[bytes]:
        """Return members up to a score, the lowest first: nobody names another lowest one."""
        return self._members(name, lambda score: score <= high)[start : start + num]

    async def zrevrangebyscore(self, name: str, high: str, low: str, start: int, num: int) -> list[bytes]:
        """Return members below a score, the highest first: nobody names another lowest one."""
        top = float(high.removeprefix("("))
        found = self._members(name, lambda score: score < top or not high.startswith("("))
        return found[::-1][start : start + num]

    async def zremrangebyrank(self, name: str, start: int, end: int) -> None:
        """Let be: no test has that many jobs."""

    async def zremrangebyscore(self, name: str, low: str, high: float) -> None:
        """Let be: nothing is that old."""

    def pipeline(self, transaction: bool = False) -> _Pipeline:
        """Return what collects commands."""
        return _Pipeline(self)

    def _text(self, name: str | bytes) -> bytes | None:
        value = self._backend.get(name)
        return value.encode() if isinstance(value, str) else value

    def _members(self, name: str, is_meant: Callable[[float], bool]) -> list[bytes]:
        found = [(score, member) for member, score in self._sets.get(name, {}).items() if is_meant(score)]
        return [member.encode() for _, member in sorted(found)]


class _Pipeline:
    """Collects commands, and does them one after the other."""

    def __init__(self, redis: MemoryRedis) -> None:
        self._redis, self._calls = redis, list[tuple[str, Any, Any]]()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self._calls.append((name, args, kwargs))

    async def execute(self) -> list[Any]:
        """Return what the commands return."""
        return [await getattr(self._redis, name)(*args, **kwargs) for name, args, kwargs in self._calls]
