"""Server-sent events: how one is written, and the answer that sends them until they end or the caller leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdtpu_worker.http.departures import wait_for_departure

HEARTBEAT = b": still there\n\n"
HEARTBEAT_S = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy takes the stream for dead."""


def write_event(name: str, data: Any, event_id: str | None = None) -> bytes:
    """Return one event.

    Args:
        name: of the event.
        data: JSON-compatible.
        event_id: what a client that comes back names in `Last-Event-ID`.
    """
    lines = [f"event: {name}", f"data: {json.dumps(data, separators=(',', ':'))}"]
    if event_id is not None:
        lines.insert(0, f"id: {event_id}")
    return ("\n".join(lines) + "\n\n").encode()


class EventStream(Response):
    """Sends events until they end; when the caller leaves, their generator is closed at once.

    Args:
        events: yields whole events and comments.
        on_end: called once, when the stream has ended.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                         media_type="text/event-stream")  # fmt: skip
        del self.headers["Content-Length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        sending = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(wait_for_departure(receive))
        try:
            await asyncio.wait([sending, left], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, left):
                task.cancel()
            await asyncio.gather(sending, left, return_exceptions=True)
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
