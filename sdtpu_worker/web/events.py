"""Server-sent events: how one is written, and the events of a job."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.polling_feed import PollingWatch
from sdtpu_worker.web.state_feed import Watch

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


async def job_events(
    watch: Watch | PollingWatch, show: Callable[[JobState], dict[str, object]], last: str | None
) -> AsyncGenerator[bytes, None]:
    """Yield a job's states as events, up to its end; the first one only if the client has not seen it.

    Args:
        watch: of the job.
        show: returns the job as clients see it.
        last: the id of the last event that the client has seen.
    """
    state: JobState | None = None
    preview = None
    while not (state and state.has_ended):
        state = await watch.next_state(HEARTBEAT_S)
        if state is None:
            yield HEARTBEAT
            continue
        if state.has_ended:
            yield write_event("done", show(state), state.token)
        elif state.token != last:
            has_preview = state.preview is not None and state.preview != preview
            progress = {"status": state.status, **(state.progress or {})}
            yield write_event("progress", progress, None if has_preview else state.token)
            if has_preview:
                preview = state.preview
                yield write_event("preview", {"format": "png", "b64_json": preview}, state.token)
        last = None
