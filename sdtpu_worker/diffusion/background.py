"""A value that a thread makes while the caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """The value is not made to its end: nobody wants it any more."""


class Background(Generic[T]):
    """Makes a value in a daemon thread, from the moment at which this object is made. Any thread may ask for it.

    Args:
        make: makes the value; it calls its argument from time to time, which raises `Cancelled` once nobody wants it.
        name: of the thread.
    """

    def __init__(self, make: Callable[[Callable[[], None]], T], *, name: str) -> None:
        self._make, self._cancelled = make, threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return at once while all is well.

        Raises:
            Exception: what `make` raised, if it has failed already.
        """
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """Wait for the value.

        Raises:
            Exception: what `make` raised.
        """
        self._thread.join()
        self.check()
        return self._value  # type: ignore[return-value]  # the thread has ended without an error

    def cancel(self) -> None:
        """Have `make` end early, and wait until it has."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._value = self._make(self._go_on)
        except BaseException as exc:  # it is raised where the value is asked for
            self._error = exc

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("nobody wants this value any more")
