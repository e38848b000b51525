"""Logging as it was: a worker in a test's own process sets the root logger up for itself, and leaves it so."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Give every logger the level, the handlers and the propagation back that it had before the block."""
    loggers = [logging.getLogger(), *(each for each in logging.root.manager.loggerDict.values()
                                      if isinstance(each, logging.Logger))]  # fmt: skip
    before = [(logger, logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, level, handlers, propagate in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
            logger.propagate = propagate
