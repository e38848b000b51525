"""A job as clients see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtpu_worker.contract.request import PICTURES
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_state import JobState


def job_json(
    record: JobRecord,
    state: JobState,
    base: str,
    wait: Mapping[str, Any] | None = None,
    with_preview: bool = False,
) -> dict[str, Any]:
    """Return a job as clients see it.

    Args:
        record: of the job.
        state: of the job.
        base: the address of the jobs API, before the id.
        wait: where it waits in Redis, as `live_feed.wait_of` has it; None where it does not, or nobody has looked.
        with_preview: whether its forming picture is in it, for a client that asks again and again in place of a stream.
    """
    place = f"{base}/{record.id}"
    links = {"self": place, "events": f"{place}/events"}
    result = None
    if state.result is not None:
        image = state.result["image"]
        links["image"] = f"{place}/image"
        result = {name: value for name, value in state.result.items() if name not in ("image", "task_id")}
        result["options"] = _shown(result["options"]) if isinstance(result.get("options"), dict) else {}
        result["image"] = {name: image.get(name) for name in ("format", "width", "height", "bytes")}
    return {
        "id": record.id,
        "status": state.status,
        "created_at": record.created_at,
        "parameters": {**_shown(record.parameters), "seed_text": str(record.parameters["seed"])},
        "wait": wait,
        "progress": state.progress,
        "preview": preview_json(state) if with_preview else None,
        "result": result,
        "error": {"type": state.error.type, "detail": state.error.detail} if state.error else None,
        "links": links,
    }


def preview_json(state: JobState) -> dict[str, Any] | None:
    """Return a job's newest preview as clients see it; None if there is none."""
    return None if state.preview is None else {"format": "png", "b64_json": state.preview}


def _shown(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters without the places of pictures in the store."""
    return {name: "a picture" if name in PICTURES and value else value for name, value in parameters.items()}
