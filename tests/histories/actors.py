"""Threads that run one at a time, each until the scheduler's word: so that a history is the same each time.

An actor stands for a thread of a worker process. It runs when the scheduler runs it, and stops before each command that
it sends to Redis, once it has sent as many as it may; or where it waits for time to pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

_TIMEOUT_S = 60.0  # longer than any command takes; an actor that waits for another actor's lock would wait for ever


class Killed(BaseException):
    """The actor's process was killed: raised where the actor stands. No handler of the package catches it."""


class Fate(Enum):
    """What happens to a command on its way."""

    DONE = "done"
    LOST = "lost"  # the connection breaks before Redis gets the command
    UNANSWERED = "unanswered"  # the connection breaks after Redis has done it


class Actor:
    """A thread that the scheduler runs.

    Args:
        name: of the thread, within its process.
        body: what it does.
        process: whose thread it is.

    Attributes:
        is_done: whether the body has ended.
        is_idle: whether it stands where it waits for time to pass, not within an operation.
        error: what ended the body, if that was an exception.
    """

    current: Actor | None = None

    def __init__(self, name: str, body: Callable[[], None], process: Any) -> None:
        self.name, self._body, self.process = name, body, process
        self.is_done, self.is_idle = False, True
        self.error: Exception | None = None
        self.commands_left, self._fate, self._is_killed = 0, Fate.DONE, False
        self._go, self._pause = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._pause.acquire()
        threading.Thread(target=self._run, name=f"{process.host}-{name}", daemon=True).start()

    def run(self, commands: int = 1_000_000, fate: Fate = Fate.DONE) -> None:
        """Let it run until it waits, or until it would send one more command than it may. The scheduler's thread.

        Args:
            commands: how many it may send.
            fate: of the last one.
        """
        if self.is_done:
            return
        self.commands_left, self._fate, Actor.current = commands, fate, self
        self._go.release()
        if not self._pause.acquire(timeout=_TIMEOUT_S):
            raise RuntimeError(f"{self.name} of {self.process.host} does not come to a command or to its end")
        Actor.current = None

    def kill(self) -> None:
        """End it where it stands. The scheduler's thread."""
        self._is_killed = True
        self.run()

    def idle(self) -> None:
        """Wait to be run again. The actor's thread."""
        self.is_idle = True
        self._wait()
        self.is_idle = False

    def before_command(self) -> Fate:
        """Wait until another command may be sent; return what shall happen to it. The actor's thread."""
        if self._is_killed:
            raise Killed
        while self.commands_left == 0:
            self._wait()
        self.commands_left -= 1
        return self._fate if self.commands_left == 0 else Fate.DONE

    def _wait(self) -> None:
        self._pause.release()
        self._go.acquire()
        if self._is_killed:
            raise Killed

    def _run(self) -> None:
        self._go.acquire()
        self.is_idle = False
        try:
            if not self._is_killed:
                self._body()
        except Killed:
            pass
        except Exception as exc:  # of any kind: the scheduler reports it
            self.error = exc
        self.is_done = True
        self._pause.release()


class ActorLock:
    """A lock of a worker process that an actor may hold while it waits for the scheduler; the others wait, too."""

    def __init__(self) -> None:
        self._holder: Actor | None = None

    def __enter__(self) -> None:
        actor = Actor.current
        while self._holder is not None and actor is not None:
            actor.process.sleep(0.05)
        self._holder = actor

    def __exit__(self, *_: object) -> None:
        self._holder = None
