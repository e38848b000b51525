"""A real Redis whose clock is virtual, and connections to it that break when the scheduler says so.

The scripts take their time from Redis' command TIME, whose reply is a list of two texts. Here they read the same two
texts from a list in Redis; nothing else about them changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from tests.histories.actors import Actor, Fate

if TYPE_CHECKING:
    from tests.histories.worker import WorkerProcess

TIME_KEY = "history:time"
"""A list of two texts: the seconds and the microseconds of Redis' clock."""
_ASKS_TIME = "redis.call('TIME')"
_READS_TIME = f"redis.call('LRANGE', '{TIME_KEY}', 0, 1)"


@functools.cache
def with_virtual_time(script: str) -> str:
    """Return a script that reads the virtual time instead of Redis' own."""
    assert script.count("TIME") == script.count(_ASKS_TIME), "the script has another way to know the time"
    return script.replace(_ASKS_TIME, _READS_TIME)


class VirtualConnection(redis.UnixDomainSocketConnection):
    """A connection of a worker process. Each command waits for the scheduler, and has the fate that it says.

    Args:
        process: whose connection it is.
        options: of redis-py's connection.
    """

    def __init__(self, process: WorkerProcess, **options: Any) -> None:
        self.process = process
        self._command: tuple[Any, ...] = ()
        self._failovers = process.world.failovers
        super().__init__(**options)

    def on_connect(self) -> None:
        """Say nothing to Redis: no password, no database, no name."""
        self._parser.on_connect(self)

    def send_command(self, *args: Any, **options: Any) -> None:
        """Send a command that knows the virtual time."""
        self._command = args
        if args[0] == "EVAL":
            args = ("EVAL", with_virtual_time(args[1]), *args[2:])
        elif args[0] == "TIME":
            args = ("LRANGE", TIME_KEY, 0, 1)
        super().send_command(*args, **options)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command when the scheduler lets it go.

        Raises:
            RedisConnectionError: the connection breaks, before or after Redis does the command.
        """
        named, self._command = self._command, ()
        actor = Actor.current
        if actor is None:
            super().send_packed_command(command, check_health)
            return
        fate = actor.before_command()
        world = self.process.world
        if fate is Fate.LOST or self.process.is_cut_off or self._failovers != world.failovers:
            self.disconnect()
            self._failovers = world.failovers
            raise RedisConnectionError("the connection broke before the command")
        world.before_command(named)
        super().send_packed_command(command, check_health)
        self.can_read(timeout=30)  # so that Redis has done it
        world.after_command(self.process, named)
        if fate is Fate.UNANSWERED:
            self.disconnect()
            raise RedisConnectionError("the connection broke after the command")


def make_pool(process: WorkerProcess, path: str) -> redis.ConnectionPool:
    """Return a pool of connections of a worker process.

    Args:
        process: whose.
        path: of the Unix socket on which Redis listens.
    """
    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "protocol": 2, "driver_info": None}
    return redis.ConnectionPool(connection_class=VirtualConnection, process=process, path=path, **options)
