"""One Celery task in a device worker: its terms, its cancellation, its progress, and its end in Celery's own words."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, SoftTimeLimitExceeded
from celery.worker import state

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.loop import JobCancelled, JobOverdue, Progress
from sdtpu_worker.request import DEFAULT_PRIORITY

if TYPE_CHECKING:
    from celery import Task

_ANNOUNCEMENT_TIMEOUT_S = 10.0
_current = threading.local()


class DeviceJob:
    """What the pool knows of a task that it runs; used by the task's own thread, terminated from any.

    Args:
        request: the worker's `celery.worker.request.Request`.
        soft_time_limit_s, time_limit_s: from the time when the job has its slot; None for none.
        on_time_limit: Celery's own handling of a hard time limit.
        cancel: takes the job off the devices, by task id.
    """

    def __init__(
        self,
        request: Any,
        soft_time_limit_s: float | None,
        time_limit_s: float | None,
        on_time_limit: Callable[[bool, float], None] | None,
        cancel: Callable[[str], None],
    ) -> None:
        self.request = request
        self.soft_time_limit_s, self.time_limit_s = soft_time_limit_s, time_limit_s
        self._on_time_limit, self._cancel = on_time_limit, cancel
        self._reporting = threading.Lock()
        self.terminated = False

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.request.id

    def terms(self) -> Terms:
        """Return what the policy should know of the client's wishes."""
        priority = (self.request.delivery_info or {}).get("priority")
        expires: datetime | None = self.request.expires
        left_s = (expires - datetime.now(expires.tzinfo)).total_seconds() if expires else math.inf
        return Terms(
            priority=priority if isinstance(priority, int) else DEFAULT_PRIORITY,
            expires_at=time.monotonic() + left_s,
            soft_time_limit_s=self.soft_time_limit_s or math.inf,
            time_limit_s=self.time_limit_s or math.inf,
        )

    def may_start(self) -> bool:
        """Whether the job is still wanted; asked until it has its slot. Any thread."""
        return not self.terminated and self.task_id not in state.revoked

    def terminate(self) -> None:
        """Take the job off its slot at the next tick; no state of its own is stored from now on. Any thread."""
        with self._reporting:
            self.terminated = True
        self._cancel(self.task_id)

    def was_cancelled(self) -> bool:
        """Whether the worker gives the job back to the queue (a cold shutdown): it must not be acknowledged."""
        return bool(self.request._already_cancelled)

    def report(self, task: Task, progress: Progress) -> None:
        """Store the state PROGRESS, unless the job was terminated."""
        meta: dict[str, Any] = {
            "current": progress.current,
            "total": progress.total,
            "percent": 100 * progress.current // progress.total,
            "pending": progress.pending,
            "description": progress.description,
            "eta_s": None if progress.eta_s is None else round(progress.eta_s, 2),
        }
        if progress.preview is not None:
            meta["preview"] = _data_uri(progress.preview)
        with self._reporting:
            if not self.terminated and not task.request.ignore_result:
                task.update_state(state="PROGRESS", meta=meta)

    @contextlib.contextmanager
    def in_celerys_words(self) -> Iterator[None]:
        """Turn what the device loop raises for this job into what Celery does for any task."""
        try:
            yield
        except (JobCancelled, JobOverdue) as exc:
            reason = exc.reason if isinstance(exc, JobOverdue) else None
            if self.terminated:
                raise self._leave_to_the_announcement() from None
            if reason is Overdue.SOFT_TIME_LIMIT:
                raise SoftTimeLimitExceeded(self.soft_time_limit_s) from None
            if reason is Overdue.TIME_LIMIT and self._on_time_limit and self.time_limit_s:
                self._on_time_limit(False, self.time_limit_s)
                raise Ignore from None
            if not self.request.revoked():  # the wall clock may be a moment behind ours
                state.revoked.add(self.task_id)
                self.request.revoked()
            raise Ignore from None
        if self.terminated:
            raise self._leave_to_the_announcement()

    def _leave_to_the_announcement(self) -> Ignore:
        """Wait until the main thread has said what becomes of the job: revoked, or back to the queue."""
        deadline = time.monotonic() + _ANNOUNCEMENT_TIMEOUT_S
        while not (self.request._already_revoked or self.was_cancelled()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return Ignore()

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Make this the `current_job()` of the calling thread."""
        _current.job = self
        try:
            yield
        finally:
            _current.job = None


def current_job() -> DeviceJob | None:
    """Return the job that the calling thread runs, if a `DevicePool` started it."""
    return getattr(_current, "job", None)


def _data_uri(pixels: Any) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
