"""A real Redis whose clock is virtual, and connections to it that break when the scheduler says so.

The scripts take their time from Redis' command TIME, whose reply is a list of two texts. Here they get the same two
texts as two more arguments, which they take off the list of their arguments first; nothing else about them changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from tests.histories.actors import Actor, Fate

if TYPE_CHECKING:
    from tests.histories.worker import WorkerProcess

_ASKS_TIME = "redis.call('TIME')"
_TAKES_TIME = "local virtual_time = {ARGV[#ARGV - 1], table.remove(ARGV)} table.remove(ARGV)\n"


@functools.cache
def with_virtual_time(script: str) -> str:
    """Return a script that takes the time from its last two arguments instead of from Redis."""
    assert script.count("TIME") == script.count(_ASKS_TIME), "the script has another way to know the time"
    return _TAKES_TIME + script.replace(_ASKS_TIME, "virtual_time")


class VirtualConnection(redis.UnixDomainSocketConnection):
    """A connection of a worker process. Each command waits for the scheduler, and has the fate that it says.

    Args:
        process: whose connection it is.
        options: of redis-py's connection.
    """

    def __init__(self, process: WorkerProcess, **options: Any) -> None:
        self.process = process
        self._is_begun = False
        self._failovers = process.world.failovers
        super().__init__(**options)

    def on_connect(self) -> None:
        """Say nothing to Redis: no password, no database, no name."""
        self._parser.on_connect(self)

    def send_command(self, *args: Any, **options: Any) -> None:
        """Send a command, with the virtual time, when the scheduler lets it go."""
        command, fate = args, self._begin(args)
        time = self.process.world.redis_time
        if args[0] == "EVAL":
            args = ("EVAL", with_virtual_time(args[1]), *args[2:], *time())
        elif args[0] == "TIME":
            args = ("EVAL", with_virtual_time(f"return {_ASKS_TIME}"), 0, *time())
        self._is_begun = True
        try:
            super().send_command(*args, **options)
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
        world = self.process.world
        fate = Fate.DONE if Actor.current is None else Actor.current.before_command()
        if fate is Fate.LOST or self.process.is_cut_off or self._failovers != world.failovers:
            self.disconnect()
            self._failovers = world.failovers
            raise RedisConnectionError("the connection broke before the command")
        world.before_command(command)
        return fate

    def _end(self, fate: Fate, command: Sequence[Any]) -> None:
        """Wait until Redis has done a command, if somebody wants to know.

        Raises:
            RedisConnectionError: it is not answered.
        """
        self.can_read(timeout=30)
        self.process.world.after_command(self.process, command)
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
