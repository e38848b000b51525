"""Real Redis servers whose clock is virtual, and connections to them that break when a history says so.

The scripts take their time from Redis' command TIME, whose reply is a list of two texts. Here they get the same two
texts as two more arguments, which they take off the list of their arguments first; nothing else about them changes.
"""

from __future__ import annotations

import functools
import select
import socket
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from tests.histories.actors import Actor, Fate

if TYPE_CHECKING:
    from tests.histories.worker import WorkerProcess
    from tests.histories.world import World

_ASKS_TIME = "redis.call('TIME')"
_TAKES_TIME = "local virtual_time = {ARGV[#ARGV - 1], table.remove(ARGV)} table.remove(ARGV)\n"


class Server:
    """A Redis server: a database of the one process that all histories use.

    Args:
        path: of the Unix socket on which that process listens.
        db: the number of the database, which is emptied.

    Attributes:
        client: asks and changes it at once, as nobody in a history can.
        connections: those that worker processes have, or had.
        is_down: nobody can connect.
        timeout_s: Redis' `timeout`; 0 for none.
    """

    def __init__(self, path: str, db: int) -> None:
        self.path, self.db = path, db
        self.client, self._wire = _client(path, db)
        self.connections: weakref.WeakSet[VirtualConnection] = weakref.WeakSet()
        self.is_down, self.timeout_s = False, 0.0
        self.client.flushdb()

    def ask(self, *command: Any) -> Any:
        """Return the answer to a command, as Redis sent it: quicker than the client, in what a history does often."""
        self._wire.send_command(*command)
        return self._wire.read_response()

    def close_connections(self) -> None:
        """Close every connection, as a server does that ends."""
        for connection in list(self.connections):
            connection.is_broken = True
            connection.close_from_afar()

    def close_idle_connections(self, now: float) -> None:
        """Do what Redis does where it has a `timeout`: not to connections that subscribe."""
        for connection in list(self.connections):
            is_idle = now - connection.used_at >= self.timeout_s
            if self.timeout_s and is_idle and not connection.is_subscriber:
                connection.close_from_afar()

    def dump(self) -> dict[Any, Any]:
        """Return all that it holds."""
        return {key: self.client.dump(key) for key in self.client.scan_iter()}

    def restore(self, dumped: dict[Any, Any]) -> None:
        """Hold what was dumped, and nothing else."""
        self.client.flushdb()
        for key, value in dumped.items():
            self.client.restore(key, 0, value)


@functools.cache
def _client(path: str, db: int) -> tuple[redis.Redis, Any]:
    """Return a client, and one of its connections."""
    connection_class = redis.UnixDomainSocketConnection
    pool = redis.ConnectionPool(connection_class=connection_class, path=path, db=db, protocol=2)
    return redis.Redis(connection_pool=pool), pool.get_connection()


@functools.cache
def with_virtual_time(script: str) -> str:
    """Return a script that takes the time from its last two arguments instead of from Redis."""
    assert script.count("TIME") == script.count(_ASKS_TIME), "the script has another way to know the time"
    return _TAKES_TIME + script.replace(_ASKS_TIME, "virtual_time")


class VirtualConnection(redis.UnixDomainSocketConnection):
    """A connection of a worker process. Each command waits for the scheduler, and has the fate that it says.

    Args:
        process: whose connection it is.
        server: to which.
        options: of redis-py's connection.

    Attributes:
        used_at: when, in true time, it last sent something.
        is_subscriber: it has subscribed.
        is_broken: its server, not its idleness, has closed it.
    """

    def __init__(self, process: WorkerProcess, server: Server, **options: Any) -> None:
        self.process, self.server = process, server
        self._is_begun = self.is_subscriber = self.is_broken = False
        self.used_at = process.world.now
        super().__init__(**options)

    @property
    def world(self) -> World:
        """The world of its process."""
        return self.process.world

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Greet Redis; the scheduler does not stop between these commands.

        Raises:
            RedisConnectionError: nobody listens.
        """
        if self.process.is_cut_off or self.server.is_down:
            self._break("the connection was refused")
        self._is_begun, self.is_subscriber, self.is_broken, self.used_at = True, False, False, self.world.now
        try:
            super().on_connect_check_health(check_health)
        finally:
            self._is_begun = False
        self.server.connections.add(self)

    def close_from_afar(self) -> None:
        """Have the server close it: whoever reads it, or writes to it, finds that out."""
        if self._sock is not None:
            self._sock.shutdown(socket.SHUT_RDWR)
            self.server.connections.discard(self)

    def send_command(self, *args: Any, **options: Any) -> None:
        """Send a command, with the virtual time, when the scheduler lets it go."""
        if self._is_begun:
            super().send_command(*args, **options)
            return
        command, fate = args, self._begin(args)
        time = self.world.redis_time
        if args[0] == "EVAL":
            args = ("EVAL", with_virtual_time(args[1]), *args[2:], *time())
        elif args[0] == "TIME":
            args = ("EVAL", with_virtual_time(f"return {_ASKS_TIME}"), 0, *time())
        self._is_begun = True
        try:
            super().send_command(*args, **options)
        except RedisConnectionError:
            self.world.facts.on_fault(self, was_idle=not self.is_broken)
            raise
        finally:
            self._is_begun = False
        self._end(fate, command)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command, or several at once, when the scheduler lets them go."""
        fate = Fate.DONE if self._is_begun else self._begin(())
        super().send_packed_command(command, check_health)
        if not self._is_begun:
            self._end(fate, ())

    def _begin(self, command: Sequence[Any]) -> Fate:
        """Wait for the scheduler, and return what shall happen to a command.

        Raises:
            RedisConnectionError: it is lost.
        """
        fate = Fate.DONE if Actor.current is None else Actor.current.before_command()
        if fate is Fate.LOST or self.process.is_cut_off or self.server.is_down:
            self._break("the connection broke before the command")
        self.world.before_command(self.server, command)
        self.used_at = self.world.now
        return fate

    def _end(self, fate: Fate, command: Sequence[Any]) -> None:
        """Wait until Redis has done a command, if somebody wants to know.

        Raises:
            RedisConnectionError: it is not answered.
        """
        reply = select.poll()
        reply.register(self._sock, select.POLLIN)
        reply.poll(30_000)  # the reply stays in the socket, where the event loop finds it
        self.is_subscriber |= command[:1] == ("SUBSCRIBE",)
        self.world.after_command(self.process, self.server, command)
        if fate is Fate.UNANSWERED:
            self._break("the connection broke after the command")

    def _break(self, text: str) -> None:
        self.disconnect()
        self.world.facts.on_fault(self, was_idle=False)
        raise RedisConnectionError(text)


def connection_options(process: WorkerProcess, server: Server) -> dict[str, Any]:
    """Return what makes a connection of a worker process to a server."""
    return {
        "process": process, "server": server, "path": server.path, "db": server.db,
        "protocol": process.world.protocol, "retry": Retry(NoBackoff(), 0), "driver_info": None,
    }  # fmt: skip


def make_pool(process: WorkerProcess, server: Server) -> redis.ConnectionPool:
    """Return a pool of connections of a worker process to a server."""
    options = connection_options(process, server)
    return redis.ConnectionPool(connection_class=VirtualConnection, **options)
