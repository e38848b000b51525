"""A worker's connection to the broker's Redis: one client for all of its threads, which follows the consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from sdtpu_worker.delivery.scripts import is_read_only

if TYPE_CHECKING:
    from redis import Redis


class Connection:
    """Makes the client at its first use, and another one when the consumer takes its messages elsewhere. Any thread.

    Args:
        connect: makes a client of the broker's Redis, with time-outs.
    """

    def __init__(self, connect: Callable[[], Redis]) -> None:
        self._connect = connect
        self._connecting = threading.Lock()
        self._client: Redis | None = None

    def client(self) -> Redis:
        """Return the client.

        Raises:
            Exception: any error of the driver when Redis cannot be reached.
        """
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script in Redis and return its result.

        Args:
            script: its Lua text.
            keys: the script's KEYS.
            args: the script's ARGV.

        Raises:
            redis.exceptions.RedisError: Redis was not reached, or refused.
        """
        client = self.client()
        try:
            return client.eval(script, len(keys), *keys, *args)
        except ResponseError as exc:
            if is_read_only(exc):  # the name of the server may belong to another one by now: connect anew
                client.connection_pool.disconnect()
            raise

    def follow(self, connect: Callable[[], Redis]) -> None:
        """Use another server from the next command on: the consumer takes its messages from there now.

        Args:
            connect: makes a client of that server, with time-outs.
        """
        with self._connecting:
            client, self._client, self._connect = self._client, None, connect
        if client is not None:  # other threads may use some of its connections at this moment
            client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close the client's connections to the server."""
        with self._connecting:
            if self._client is not None:
                self._client.connection_pool.disconnect()
                self._client = None
