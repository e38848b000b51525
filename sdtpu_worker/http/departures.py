"""Callers that go away: noticed at once, whether the door is at work for them or waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

T = TypeVar("T")


class CallerLeft(Exception):
    """The caller has closed its connection."""


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work returns; the request's body must have been read.

    Raises:
        CallerLeft: the caller went away first; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(wait_for_departure(request.receive))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CallerLeft
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def wait_for_departure(receive: Receive) -> None:
    """Return when the caller has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
