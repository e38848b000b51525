"""The second connection of a channel, on which Redis says that a list which a claim found empty was written to.

`CLIENT TRACKING` makes Redis remember the keys that a connection has read and report the first write to them to another
connection. Without that an idle worker would have to poll.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from typing import Any

from kombu.transport import redis as kombu_redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

logger = logging.getLogger(__name__)

WAKE_UP = "WAKE_UP"
"""A kind of connection of a channel, beside kombu's own BRPOP (here the claims) and LISTEN."""


class WakeUp:
    """Watches for writes in the event loop of its channel. The worker's main thread.

    Args:
        channel: a kombu channel to Redis.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._connection: Any = None
        self._connection_id = 0
        self._tracked: Any = None  # the socket of the claims whose keys Redis remembers

    def tracks(self, claims: Any) -> bool:
        """Return whether Redis reports writes to what this connection reads."""
        return self._tracked is not None and claims._sock is self._tracked

    def track(self, claims: Any) -> None:
        """Have Redis report writes to what a connection reads from now on; where it refuses to, nothing changes.

        Args:
            claims: the connection on which the channel claims messages.
        """
        self._tracked = None
        try:
            if self._connection is None or self._connection._sock is None:
                self._connection = connection = self._channel.client.connection_pool.get_connection()
                connection.connect()
                self._connection_id = _ask(connection, "CLIENT", "ID")
                if str(connection.get_protocol()) != "3":
                    _ask(connection, "SUBSCRIBE", "__redis__:invalidate")
                connection._sock.setblocking(False)
                self._join_event_loop(connection)
            _ask(claims, "CLIENT", "TRACKING", "ON", "REDIRECT", self._connection_id)
            self._tracked = claims._sock
        except ResponseError as exc:
            logger.info("Redis does not say when jobs arrive (%s): this worker polls their queues instead", exc)

    def read(self) -> None:
        """Read away what Redis reported; that something came is all that counts.

        Raises:
            redis.exceptions.ConnectionError: the connection was closed.
        """
        connection = self._connection
        if connection._sock is None or not _drain(connection._sock):
            connection.disconnect()
            raise RedisConnectionError("the connection on which Redis says that jobs arrive was closed")

    def _join_event_loop(self, connection: Any) -> None:
        poller, sock = self._channel.connection.cycle, connection._sock
        poller._fd_to_chan[sock.fileno()] = (self._channel, WAKE_UP)
        poller._chan_to_sock[self._channel, _Client(connection), WAKE_UP] = sock
        poller.poller.register(sock, poller.eventflags)


class Poller(kombu_redis.MultiChannelPoller):
    """kombu's poller of a transport's connections, which also knows those on which Redis reports writes."""

    def maybe_restore_messages(self) -> None:
        """Have one channel restore what kombu popped for consumers that died, if a channel has queues of that kind."""
        for channel in self._channels:
            if channel.other_queues:
                with contextlib.suppress(*channel.connection_errors):  # the event loop reconnects
                    channel.qos.restore_visible(
                        num=channel.unacked_restore_limit, interval=channel.unacked_restore_throttle
                    )
                return

    def on_readable(self, fileno: int) -> Any:
        """Handle a connection that has something to read."""
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        return channel.handlers[WAKE_UP]() if kind == WAKE_UP else super().on_readable(fileno)


class _Client:
    """What kombu's poller knows a socket by: something with a connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


def _ask(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _drain(sock: socket.socket) -> bool:
    """Read away what is there, whatever it says; return False when the other side has closed."""
    try:
        while data := sock.recv(65_536):
            del data
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    return False
