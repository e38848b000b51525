"""The door's OpenAPI description."""

from __future__ import annotations

from typing import Any


def describe(server: str) -> dict[str, Any]:
    """Return the description of every path.

    Args:
        server: the address of the door.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdtpu_worker", "version": "0"},
        "servers": [{"url": server}],
        "paths": {},
    }
