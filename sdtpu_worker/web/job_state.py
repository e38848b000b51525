"""What the result backend has of a job, as plain data: read from Celery's JSON without building what it names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery.backends.base import Backend, KeyValueStoreBackend

from sdtpu_worker.client.stored_state import UNREADABLE, read_stored
from sdtpu_worker.errors import StorageError
from sdtpu_worker.images.decode import named_image
from sdtpu_worker.redaction import sanitize_url

ENDED = ("succeeded", "failed", "cancelled")
_STATUS = {
    "STARTED": "running",
    "PROGRESS": "running",
    "SUCCESS": "succeeded",
    "FAILURE": "failed",
    "REVOKED": "cancelled",
}
"""By Celery's states; a job of any other state is `queued`."""
_PROGRESS_FIELDS = {
    "current": int, "total": int, "percent": int, "pending": bool, "description": str, "eta_s": int | float,
}  # fmt: skip
_MOST_CHARACTERS = 2000
_PREVIEW_START = "data:image/png;base64,"
_MOST_PREVIEW_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class JobError:
    """Why a job has no picture.

    Attributes:
        type: the name of the exception's class, such as `InvalidRequest`.
        detail: its text.
    """

    type: str
    detail: str


@dataclass(frozen=True)
class JobState:
    """A job at one moment.

    Attributes:
        status: queued, running, succeeded, failed or cancelled.
        progress: the fields of `PROGRESS` that clients see; None before the first step and after the end.
        preview: base64 of a small PNG; None if there is none.
        result: the `GenerationResult` of a job that has succeeded, in JSON.
        error: of a job that has failed or was cancelled.
        token: tells this state from any other one of the job.
    """

    status: str = "queued"
    progress: Mapping[str, Any] | None = None
    preview: str | None = field(default=None, repr=False)
    result: Mapping[str, Any] | None = None
    error: JobError | None = None
    token: str = "0"

    @property
    def has_ended(self) -> bool:
        """Whether no other state follows."""
        return self.status in ENDED


QUEUED = JobState()


def read_state(backend: Backend, stored: bytes | str | None) -> JobState:
    """Return the state in what is stored under a task's key, or published on its channel.

    Args:
        backend: the app's result backend, for its serializer and its compression.
        stored: what is there, as bytes or as text; None for nothing.
    """
    if stored is None:
        return QUEUED
    token = _token_of(stored)
    try:
        meta = backend.decode(stored)
    except Exception as exc:  # others can write to the result backend, and each serializer has errors of its own
        return _unreadable(exc, token)
    return _state_in(meta, token)


def read_state_of(backend: Backend, task_id: str) -> JobState:
    """Return the state that a result backend of any kind keeps of a task.

    Args:
        backend: of this thread; one that keeps results by task id.
        task_id: the task's.

    Raises:
        Exception: the backend does not answer; each backend has errors of its own.
    """
    if isinstance(backend, KeyValueStoreBackend):
        return read_state(backend, backend.get(backend.get_key_for_task(task_id)))
    try:
        meta = read_stored(backend, task_id)
    except UNREADABLE as exc:
        return _unreadable(exc, _token_of(repr(exc)))
    if meta is None:
        return QUEUED
    return _state_in(meta, _token_of(repr((meta["status"], meta["result"]))))


def _state_in(meta: Any, token: str) -> JobState:
    """Return the state in what Celery keeps of a task."""
    try:
        status, value = _STATUS.get(meta["status"], "queued"), meta["result"]
    except (TypeError, LookupError) as exc:  # others can write to the result backend
        return _unreadable(exc, token)
    if status == "succeeded":
        try:
            named_image(value)
            json.dumps(value, allow_nan=False)
        except (StorageError, ValueError) as exc:
            return JobState("failed", error=JobError("StorageError", str(exc)), token=token)
        return JobState(status, result=value, token=token)
    if status in ENDED:
        return JobState(status, error=_read_error(value), token=token)
    progress = value if status == "running" and isinstance(value, Mapping) and "percent" in value else None
    if progress is None:
        return JobState(status, token=token)
    preview = progress.get("preview")
    shown = {name: _plain(progress.get(name), kind) for name, kind in _PROGRESS_FIELDS.items()}
    return JobState("queued" if shown["pending"] else status, shown, _preview_data(preview), token=token)


def _unreadable(exc: Exception, token: str) -> JobState:
    return JobState("failed", error=JobError("UnreadableResult", f"not a state of Celery: {exc!r:.200}"), token=token)


def _token_of(stored: bytes | str) -> str:
    return hashlib.sha256(stored.encode() if isinstance(stored, str) else stored).hexdigest()[:16]


def _plain(value: Any, kind: Any) -> Any:
    """Return a value if it is of a kind, else None: others can write to the result backend."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, kind) and is_finite else None


def _preview_data(preview: Any) -> str | None:
    is_one = isinstance(preview, str) and preview.startswith(_PREVIEW_START) and len(preview) < _MOST_PREVIEW_CHARACTERS
    return preview.removeprefix(_PREVIEW_START) if is_one else None


def _read_error(value: Any) -> JobError:
    """Return the error in Celery's JSON for an exception; no class is looked up."""
    if not isinstance(value, Mapping):
        return JobError("Error", sanitize_url(str(value))[:_MOST_CHARACTERS])
    message = value.get("exc_message")
    parts = message if isinstance(message, list | tuple) else [message]
    text = " ".join(str(part) for part in parts if part is not None)
    return JobError(str(value.get("exc_type"))[:100], sanitize_url(text)[:_MOST_CHARACTERS])
