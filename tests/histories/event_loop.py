"""Celery's event loop in virtual time: kombu's own hub, with real sockets, which waits for the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kombu.asynchronous import hub, timer
from kombu.utils import eventio

from tests.histories.actors import Actor

if TYPE_CHECKING:
    from tests.histories.worker import WorkerProcess


class VirtualPoller:
    """Looks at sockets without waiting; where none is readable, the actor waits in virtual time.

    Args:
        process: whose event loop looks.
    """

    def __init__(self, process: WorkerProcess) -> None:
        self._process, self._sockets = process, eventio.poll()
        self.register, self.unregister, self.close = (
            self._sockets.register, self._sockets.unregister, self._sockets.close,
        )  # fmt: skip

    def ready(self) -> list[Any]:
        """Return the sockets that are readable."""
        self._process.world.settle()
        events = list(self._sockets.poll(0) or ())
        return events[::-1] if self._process.world.notices_overtake else events

    def poll(self, timeout: float | None) -> list[Any]:
        """Wait for sockets to be readable, for some seconds."""
        actor = Actor.current
        assert actor is not None
        actor.before_command()  # a notice, or another process, may come between a command and its reply
        if not (events := self.ready()):
            self._process.sleep(1.0 if timeout is None else timeout, self.ready)
            events = self.ready()
        return events


class _VirtualTimer(timer.Timer):
    """kombu's timer, on a process' own clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def enter_at(self, entry: Any, eta: float | None = None, priority: int = 0, time: Any = None) -> Any:
        return super().enter_at(entry, eta, priority, self._clock)

    def enter_after(self, secs: float, entry: Any, priority: int = 0, time: Any = None) -> Any:
        return self.enter_at(entry, self._clock() + secs, priority)

    def __iter__(self, *_: Any) -> Any:
        return super().__iter__(nowfun=self._clock)


class VirtualHub(hub.Hub):
    """An event loop of a worker process.

    Args:
        process: whose.
    """

    def __init__(self, process: WorkerProcess) -> None:
        self._process = process
        super().__init__(_VirtualTimer(process.monotonic))

    def _create_poller(self) -> None:
        self._poller = VirtualPoller(self._process)
        self._register_fd, self._unregister_fd = self._poller.register, self._poller.unregister

    def create_loop(self, **_: Any) -> Any:
        """Return the loop; without a socket to look at, it waits in virtual time too."""
        return super().create_loop(sleep=self._process.sleep)
