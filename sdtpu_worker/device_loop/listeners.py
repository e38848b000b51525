"""How the device loop tells the worker around it what happens: no error of a listener ends the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def tell(listener: Callable[..., None], *facts: Any) -> None:
    """Call a listener; log what it raises."""
    try:
        listener(*facts)
    except Exception:
        logger.exception("%r failed in the device loop, which goes on", listener)
