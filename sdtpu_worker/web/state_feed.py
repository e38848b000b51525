"""The states of jobs as they change, for any number of watchers, over one connection to Redis.

Celery's result backend publishes each state on a channel named as the key that it is stored under. The feed subscribes
to the channels of the jobs that somebody watches, and reads each job's stored state once, when it begins. A watcher
that is slower than its job sees the newest state only: memory is bounded, the order is kept, and the last state is
never left out.

A connection is written to by one task and read by another. What is stored is read on a second connection, so a fence
tells which of the two is newer: Redis answers a PING on the subscribed connection only after everything that was
published before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from redis.exceptions import RedisError

from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.watch import Topic, Watch

logger = logging.getLogger(__name__)

_AT_ONCE = 500
_FENCE_S = 10.0
"""Seconds that Redis has for a PING before its connection counts as broken."""
_QUIET_S = 15.0
"""Seconds after which an idle connection is asked whether it is alive."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class _SubscribedTopic(Topic):
    """A watched job, and what this connection has brought of it."""

    def __init__(self) -> None:
        super().__init__()
        self.was_published = False  # since the connection was made
        self.is_synced = False


class StateFeed:
    """Watches jobs. Belongs to one event loop.

    Args:
        connect: returns a connection that is not open yet, without a time limit for replies.
        read_stored: returns what is stored under some keys.
        parse: returns the state in what was stored or published.
        key_of: returns the key of a job, which is also its channel.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        read_stored: Callable[[list[bytes]], Any],
        parse: Callable[[bytes | None], JobState],
        key_of: Callable[[str], bytes],
    ) -> None:
        self._connect, self._read_stored, self._parse, self._key_of = connect, read_stored, parse, key_of
        self._topics: dict[bytes, _SubscribedTopic] = {}
        self._dropped: set[bytes] = set()
        self._wanted = asyncio.Event()
        self._fences: dict[bytes, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Watch]:
        """Watch a job for the block; its first state is that at the beginning, whatever it is."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        key = self._key_of(job_id)
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = _SubscribedTopic()
            self._dropped.discard(key)
            self._wanted.set()
        topic.watchers += 1
        try:
            yield Watch(topic)
        finally:
            topic.watchers -= 1
            if not topic.watchers:
                del self._topics[key]
                self._dropped.add(key)
                self._wanted.set()

    async def close(self) -> None:
        """End the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Keep a connection for as long as the feed lives."""
        pause_s = _FIRST_PAUSE_S
        while True:
            connection = self._connect()
            try:
                await connection.connect()
                pause_s = _FIRST_PAUSE_S
                await self._use(connection)
            except (RedisError, OSError, EOFError, asyncio.IncompleteReadError) as exc:
                logger.warning("states of jobs are not received for now, trying again: %s", exc)
            except Exception:
                logger.exception("states of jobs are not received for now, trying again")
            finally:
                with contextlib.suppress(Exception):
                    await asyncio.shield(connection.disconnect())
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _use(self, connection: Any) -> None:
        """Receive until the connection breaks.

        Raises:
            Exception: the first error of the reader or the writer.
        """
        self._dropped.clear()
        for topic in self._topics.values():
            topic.is_synced = topic.was_published = False
        tasks = [asyncio.create_task(self._read(connection)), asyncio.create_task(self._write(connection))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fences.clear()

    async def _read(self, connection: Any) -> None:
        while True:
            reply = await connection.read_response(disable_decoding=True)
            kind, rest = (reply[0], reply[1:]) if isinstance(reply, list | tuple) else (b"pong", [reply])
            if kind == b"message":
                if topic := self._topics.get(rest[0]):
                    topic.was_published = True
                    topic.put(self._parse(rest[1]))
            elif kind == b"pong" and (fence := self._fences.pop(rest[0], None)) and not fence.done():
                fence.set_result(None)

    async def _write(self, connection: Any) -> None:
        """Follow what is wanted; the only task that sends."""
        while True:
            self._wanted.clear()
            dropped, self._dropped = list(self._dropped), set()
            for keys in _batches(dropped):
                await connection.send_command("UNSUBSCRIBE", *keys)
            new = [key for key, topic in self._topics.items() if not topic.is_synced]
            for keys in _batches(new):
                await self._begin(connection, {key: self._topics[key] for key in keys if key in self._topics})
            if not (dropped or new):
                await self._pass_fence(connection)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QUIET_S):
                    await self._wanted.wait()

    async def _begin(self, connection: Any, topics: dict[bytes, _SubscribedTopic]) -> None:
        """Subscribe to some jobs, and give each its stored state unless a newer one was published meanwhile."""
        if not topics:
            return
        await connection.send_command("SUBSCRIBE", *topics)
        await self._pass_fence(connection)
        stored = await self._read_stored(list(topics))
        await self._pass_fence(connection)
        for topic, value in zip(topics.values(), stored, strict=True):
            topic.is_synced = True
            if not topic.was_published and (value is not None or not topic.version):
                topic.put(self._parse(value))

    async def _pass_fence(self, connection: Any) -> None:
        """Return when all that was published before this call has been received."""
        name = f"fence-{next(self._numbers)}".encode()
        fence = self._fences[name] = asyncio.get_running_loop().create_future()
        await connection.send_command("PING", name)
        async with asyncio.timeout(_FENCE_S):
            await fence


def _batches(keys: list[bytes]) -> list[list[bytes]]:
    return [keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE)]
