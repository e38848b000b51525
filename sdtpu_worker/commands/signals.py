"""Signals while a command runs: who imports the command line as a library finds its own handlers afterwards."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def signals_handled_by(handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals) -> Iterator[None]:
    """Have a function called for these signals while the block runs, and whatever was called before it again after it.

    Only the main thread can do this.

    Args:
        handler: what is called, as in `signal.signal`.
        numbers: the signals.
    """
    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield
