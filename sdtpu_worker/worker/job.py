"""One Celery task in a device worker: its terms, its history, its progress, and its end in Celery's own terms."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, SoftTimeLimitExceeded
from celery.states import READY_STATES, STARTED
from celery.utils.functional import maybe_list
from celery.worker import state
from redis.exceptions import RedisError

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue, Progress
from sdtpu_worker.errors import DeliveryLimitExceeded, EngineUnavailable

if TYPE_CHECKING:
    from celery import Task

    from sdtpu_worker.worker.serving import Serving

logger = logging.getLogger(__name__)

_ANNOUNCEMENT_TIMEOUT_S = 10.0
_MOST_HOSTS_NAMED = 20


class DeviceJob:
    """What the pool knows of a task that it runs; used by the task's own thread, terminated from any.

    Args:
        request: Celery's request.
        serving: runs the job on the devices.
        soft_time_limit_s, time_limit_s: from the time when the job has its slot; None for none.
        on_time_limit: Celery's own handling of a hard time limit.
        deliveries: the messages that the worker holds, if its broker is Redis.
        max_deliveries: after how many crashes with this job on the devices it fails.
    """

    def __init__(
        self,
        request: Any,
        serving: Serving,
        soft_time_limit_s: float | None = None,
        time_limit_s: float | None = None,
        on_time_limit: Callable[[bool, float], None] | None = None,
        deliveries: Deliveries | None = None,
        max_deliveries: int = 1,
    ) -> None:
        self.request, self.serving = request, serving
        self.soft_time_limit_s, self.time_limit_s = map(_positive_seconds, (soft_time_limit_s, time_limit_s))
        self._on_time_limit = on_time_limit
        self._deliveries, self._max_deliveries = deliveries, max_deliveries
        self._storing_state = threading.Lock()
        self._digest = b""
        self.terminated = False

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.request.id

    def terms(self) -> Terms:
        """Return what the policy should know of what the client asked for."""
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
        """Return whether the job is still wanted; asked until it has its slot. Any thread."""
        return not (self.terminated or self.task_id in state.revoked or _has_revoked_stamp(self.request))

    def terminate(self) -> None:
        """Take the job off its slot at the next tick; no state of its own is stored from now on. Any thread."""
        with self._storing_state:
            self.terminated = True
        self.serving.loop.cancel(self.task_id)

    def recall(self, task: Task, parameters: GenerationRequest) -> JobFacts:
        """Return what earlier workers left of the job, if there were any.

        Raises:
            Ignore: the job is done already, and only its message was not acknowledged; or Redis cannot be asked, and
                the message is requeued.
            DeliveryLimitExceeded: too many workers died with the job on their devices.
        """
        self._digest = hashlib.sha256(json.dumps(parameters.to_json(), sort_keys=True).encode()).digest()
        if self._deliveries is None or not self.request.delivery_info.get("redelivered"):
            return JobFacts()
        try:
            self._end_if_done(task)
            facts = self._deliveries.job_facts(self.task_id)
        except (OSError, RedisError) as exc:
            logger.warning("the history of task %s could not be read, its message is requeued: %s", self.task_id, exc)
            raise self._requeue() from exc
        if len(facts.died_on) >= self._max_deliveries:
            raise DeliveryLimitExceeded(
                f"the job was on the devices of {len(facts.died_on)} workers when they died, hung or were lost"
                f" ({', '.join(facts.died_on[:_MOST_HOSTS_NAMED])}); sdtpu_max_deliveries allows {self._max_deliveries}"
            )
        snapshot = facts.snapshot or b""
        fits = snapshot.startswith(self._digest)  # made for the same parameters
        return JobFacts(facts.died_on, snapshot[len(self._digest) :] if fits else None)

    def _end_if_done(self, task: Task) -> None:
        """Keep a result that is stored already: the earlier worker died between storing it and acknowledging.

        Raises:
            Ignore: there is one.
        """
        if task.request.ignore_result:
            return
        meta = task.backend.get_task_meta(self.task_id, cache=False)
        if meta["status"] not in READY_STATES:
            return
        logger.info("task %s is done already (%s): acknowledged without running again", self.task_id, meta["status"])
        if task.request.chord:  # counted by its index, so once
            task.backend.on_chord_part_return(task.request, meta["status"], meta["result"])
        raise Ignore

    def release(self) -> None:
        """Make sure that the message of a job that has ended is not held for ever.

        The message is acknowledged or requeued by now, unless that failed: then it is redelivered when its lease
        expires.
        """
        if self._deliveries is not None:
            self._deliveries.release(self.request.message.delivery_tag)

    def begin(self, task: Task) -> None:
        """Store the state STARTED, unless the job was terminated; what Celery does for `track_started`."""
        self._store_state(task, STARTED, {"pid": os.getpid(), "hostname": task.request.hostname})

    def publish_progress(self, task: Task, progress: Progress) -> None:
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
        self._store_state(task, "PROGRESS", meta)

    def _store_state(self, task: Task, name: str, meta: dict[str, Any]) -> None:
        with self._storing_state:
            if not self.terminated and not task.request.ignore_result:
                try:
                    task.update_state(state=name, meta=meta)
                except Exception as exc:  # each result backend has errors of its own; the picture does not depend on it
                    logger.debug("the state %s of task %s was not stored: %s", name, self.task_id, exc)

    @contextlib.contextmanager
    def in_celerys_words(self) -> Iterator[None]:
        """Turn what the device loop raises for this job into what Celery does for any task."""
        try:
            yield
        except (JobHandedOver, EngineUnavailable) as exc:
            if self.terminated:
                raise self._leave_to_the_announcement() from None
            self._save(getattr(exc, "snapshot", None))
            if getattr(exc, "suspect", False) and self._deliveries is not None:
                self._deliveries.mark_suspect(self.request.message.delivery_tag)
            logger.info("task %s is handed over: its message is requeued and another worker continues it", self.task_id)
            raise self._requeue() from None
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
        """Wait until the main thread has announced that the job is revoked."""
        deadline = time.monotonic() + _ANNOUNCEMENT_TIMEOUT_S
        while not self.request._already_revoked and time.monotonic() < deadline:
            time.sleep(0.005)
        return Ignore()

    def _requeue(self) -> Ignore:
        """Have the message requeued when the job's thread has ended."""
        self.request.is_requeued = True
        return Ignore()

    def _save(self, snapshot: Any) -> None:
        """Keep a snapshot for the next worker; without one the job starts anew there."""
        if snapshot is None or self._deliveries is None:
            return
        try:
            self._deliveries.save_snapshot(self.task_id, self._digest + snapshot.to_bytes())
        except (OSError, RedisError) as exc:
            logger.warning("the snapshot of task %s could not be kept, the job starts anew: %s", self.task_id, exc)


def _positive_seconds(limit: Any) -> float | None:
    """Return a time limit if it is one: Celery's remote control takes any value for it."""
    return limit if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0 else None


def _has_revoked_stamp(request: Any) -> bool:
    """Whether the job bears a stamp by which jobs were revoked."""
    return any(
        stamp in state.revoked_stamps
        and any(each in maybe_list(state.revoked_stamps[stamp]) for each in maybe_list(value) or ())
        for stamp, value in request.stamps.items()
    )


def _data_uri(pixels: Any) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
