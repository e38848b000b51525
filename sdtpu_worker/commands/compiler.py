"""What the commands that compile have in common: how they end, whoever ends them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import click

from sdtpu_worker.commands.options import clear_errors
from sdtpu_worker.commands.signals import signals_handled_by

NO_FIT = 5
"""The exit code where nothing that was compiled fits the devices' memory."""


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """End the compiler with this process, and turn what ends the block into one line.

    Raises:
        ClickException: an error of this package, or Ctrl-C.
        SystemExit: SIGTERM.
    """
    try:
        with clear_errors(), signals_handled_by(_stop, signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        raise click.ClickException("stopped") from None


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
