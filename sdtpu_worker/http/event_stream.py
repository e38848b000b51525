"""The answer that sends server-sent events until they end or the caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdtpu_worker.http.departures import wait_for_departure


class EventStream(Response):
    """Sends events until they end; when the caller leaves or the door stops, their generator is closed at once.

    Args:
        events: yields whole events and comments.
        stopping: is set when the door stops: the stream ends as if there were nothing more, and its client comes back.
        on_end: called once, when the stream has ended.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], stopping: asyncio.Event, on_end: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                         media_type="text/event-stream")  # fmt: skip
        del self.headers["Content-Length"]
        self._events, self._stopping, self._on_end = events, stopping, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(wait_for_departure(receive))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait([sending, left, stopping], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, left, stopping):
                task.cancel()
            await asyncio.gather(sending, left, stopping, return_exceptions=True)
            self._on_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
