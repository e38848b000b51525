"""The door: an ASGI app that puts the queue behind OpenAI's Images API, a jobs API and the web UI's API.

It is a client of the queue like any other: it enqueues with `generate`, reads states from the result backend's Redis
and pictures through the image store. It needs the extra `http`, and loads no JAX and nothing of the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtpu_worker.http.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":  # on first use: it needs the extra
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdtpu_worker.http.app import create_app

    return create_app
