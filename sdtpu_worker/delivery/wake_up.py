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
from redis.exceptions import RedisError, ResponseError

logger = logging.getLogger(__name__)

WAKE_UP = "WAKE_UP"
"""A kind of connection of a channel, beside kombu's own BRPOP (here the claims) and LISTEN."""
CLAIMS = "BRPOP"
"""kombu's name for the kind of connection on which a channel claims."""
RETRY_S = 1.0
"""Seconds until the connection is tried again where it cannot be had, or was lost at once."""


class WakeUp:
    """Watches for writes in the event loop of its channel. The worker's main thread.

    The connection is only an aid: where it cannot be had, or is lost, the channel polls, and a new one is tried after a
    second. Whether Redis is there at all, the claims find out.

    Args:
        channel: a kombu channel to Redis.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._connection: Any = None
        self._connection_id = 0
        self._tracked: Any = None  # the socket of the claims whose keys Redis remembers
        self._try_at, self._failure = 0.0, ""

    def tracks(self, claims: Any) -> bool:
        """Return whether Redis reports writes to what this connection reads."""
        return self._tracked is not None and claims._sock is self._tracked

    def track(self, claims: Any, now: float) -> None:
        """Have Redis report writes to what a connection reads from now on; where that fails, nothing changes.

        Args:
            claims: the connection on which the channel claims messages.
            now: monotonic seconds; a call within a second of the last one does nothing.

        Raises:
            redis.exceptions.ConnectionError: the connection of the claims is lost.
        """
        if now < self._try_at:
            return
        self._try_at, self._tracked = now + RETRY_S, None
        try:
            if self._connection is None or self._connection._sock is None:
                self._connect()
        except (RedisError, OSError) as exc:
            self._note_failure(exc)
            return
        try:
            _ask(claims, "CLIENT", "TRACKING", "ON", "REDIRECT", self._connection_id)
            self._tracked, self._failure = claims._sock, ""
        except ResponseError as exc:
            self._note_failure(exc)

    def read(self) -> None:
        """Read away what Redis reported; that something came is all that counts. A closed connection is given up."""
        connection = self._connection
        if connection._sock is None or not _drain(connection._sock):
            self._disconnect()

    def _connect(self) -> None:
        """Open the connection and have Redis take it for a subscriber's, which its `timeout` never closes.

        Raises:
            redis.exceptions.RedisError: Redis cannot be reached, or refuses.
        """
        if self._connection is None:
            self._connection = self._channel.client.connection_pool.get_connection()
        connection = self._connection
        connection.connect()
        try:
            self._connection_id = _ask(connection, "CLIENT", "ID")
            connection.send_command("SUBSCRIBE", "__redis__:invalidate")
            if str(connection.get_protocol()) == "3":
                connection.read_response(push_request=True)
            else:
                connection.read_response()
        except BaseException:
            connection.disconnect()
            raise
        connection._sock.setblocking(False)
        self._join_event_loop(connection)

    def _note_failure(self, error: Exception) -> None:
        """Say once that the channel polls, and why."""
        if self._failure != (text := str(error)):
            self._failure = text
            logger.info("Redis does not say when jobs arrive (%s): this worker polls their queues instead", error)

    def _disconnect(self) -> None:
        connection, self._tracked = self._connection, None
        poller = self._channel.connection.cycle
        for key, sock in list(poller._chan_to_sock.items()):
            if key[0] is self._channel and key[2] == WAKE_UP:
                del poller._chan_to_sock[key]
                fileno = sock.fileno()
                poller._fd_to_chan.pop(fileno, None)
                with contextlib.suppress(KeyError, ValueError, OSError):
                    poller._unregister_from_poll(fileno)
        connection.disconnect()

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
            if channel.restorable_queues:
                with contextlib.suppress(*channel.connection_errors):  # the event loop reconnects
                    channel.qos.restore_visible(
                        num=channel.unacked_restore_limit, interval=channel.unacked_restore_throttle
                    )
                return

    def on_readable(self, fileno: int) -> Any:
        """Handle a connection that has something to read.

        The reply of a claim is read whatever the worker has room for: its message is this worker's already, and must be
        held, so that its lease is renewed.
        """
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        if kind == WAKE_UP or (kind == CLAIMS and channel.is_claim_in_flight):
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def _pause_brpop(self, channel: Any, fileno: int) -> None:
        """Leave a reply unread until there is room, unless it is that of a claim."""
        if not channel.is_claim_in_flight:
            super()._pause_brpop(channel, fileno)


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
