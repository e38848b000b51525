"""Server-sent events: how one is written, and the events of a job."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.job_view import preview_json
from sdtpu_worker.web.watch import Watch

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
    watch: Watch,
    show: Callable[[JobState], dict[str, object]],
    last: str | None,
    job_id: str | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield a job's states as events, up to its end; the first one only if the client has not seen it.

    Args:
        watch: of the job.
        show: returns the job as clients see it.
        last: the id of the last event that the client has seen.
        job_id: of the job, for a stream of several jobs: each event says it then.
    """
    about = {} if job_id is None else {"id": job_id}
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
            shown = preview_json(state)
            has_preview = shown is not None and shown != preview
            progress = {**about, "status": state.status, **(state.progress or {})}
            yield write_event("progress", progress, None if has_preview else state.token)
            if shown is not None and has_preview:
                preview = shown
                yield write_event("preview", {**about, **shown}, state.token)
        last = None
