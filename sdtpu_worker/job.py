"""One Celery task in a device worker: its terms, its history, its progress, and its end in Celery's own words."""

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

from celery import signals
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from celery.states import READY_STATES, STARTED
from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.request import Request
from redis.exceptions import RedisError

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.submission import JobCancelled, JobHandedOver, JobOverdue, Progress
from sdtpu_worker.deliveries import Deliveries, JobFacts
from sdtpu_worker.errors import DeliveryLimitExceeded, EngineUnavailable
from sdtpu_worker.logs import describe
from sdtpu_worker.request import DEFAULT_PRIORITY, GenerationRequest
from sdtpu_worker.transport import ClaimingChannel

if TYPE_CHECKING:
    from celery import Task

logger = logging.getLogger(__name__)

_ANNOUNCEMENT_TIMEOUT_S = 10.0
_MOST_HOSTS_NAMED = 20
_current = threading.local()


CRASHES_TO_RUN_ALONE = 2
"""A job that was on the devices of this many workers when they died shares the devices with no other."""


class DeviceRequest(Request):
    """Celery's request, for a job on the devices, which may go back to its queue with its state.

    Attributes:
        goes_back: when the job's thread has ended, the message is given back instead of acknowledged.
        failures_outside: times that Celery failed around the task's own code. At the first one it stores that error;
            the second one says that it could not.
    """

    goes_back = False
    failures_outside = 0

    def acknowledge(self) -> None:
        """Acknowledge the message, or give it back; what became of no state comes again when its lease ends."""
        if self.goes_back:
            self.reject(requeue=True)
        elif self.failures_outside < 2:
            super().acknowledge()

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown wants the job to go back to its queue: it goes with its state."""
        pool.hand_over()


@signals.task_internal_error.connect(dispatch_uid="sdtpu_worker")
def count_failure_outside(sender: Any, exception: BaseException, **_: Any) -> None:
    """Know that Celery failed around the task of this thread; mostly, the result backend took no state."""
    job = current_job()
    if job is not None and isinstance(job.request, DeviceRequest):
        job.request.failures_outside += 1
        if isinstance(exception, EngineUnavailable):  # the worker stops, and does not wait for the result backend
            job.request.goes_back = True
        logger.warning("the state of task %s could not be stored: %s", job.task_id, describe(exception))


def answer_directly(request: Request) -> None:
    """Have a request acknowledge from the thread that runs it.

    Celery leaves that to its event loop, which has ended by the time a stopping worker's last jobs do.
    """
    message = request.message
    if isinstance(message.channel, ClaimingChannel):
        request._on_ack, request._on_reject = message.ack_log_error, message.reject_log_error


class DeviceJob:
    """What the pool knows of a task that it runs; used by the task's own thread, terminated from any.

    Args:
        request: the worker's `celery.worker.request.Request`.
        soft_time_limit_s, time_limit_s: from the time when the job has its slot; None for none.
        on_time_limit: Celery's own handling of a hard time limit.
        cancel: takes the job off the devices, by task id.
        deliveries: what the worker holds, if its broker is Redis.
        max_deliveries: after how many crashes with this job on the devices it fails.
    """

    def __init__(
        self,
        request: Any,
        soft_time_limit_s: float | None,
        time_limit_s: float | None,
        on_time_limit: Callable[[bool, float], None] | None,
        cancel: Callable[[str], None],
        deliveries: Deliveries | None = None,
        max_deliveries: int = 1,
    ) -> None:
        self.request = request
        self.soft_time_limit_s, self.time_limit_s = map(_positive_seconds, (soft_time_limit_s, time_limit_s))
        self._on_time_limit, self._cancel = on_time_limit, cancel
        self._deliveries, self._max_deliveries = deliveries, max_deliveries
        self._reporting = threading.Lock()
        self._digest = b""
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
        return not (self.terminated or self.task_id in state.revoked or _has_revoked_stamp(self.request))

    def terminate(self) -> None:
        """Take the job off its slot at the next tick; no state of its own is stored from now on. Any thread."""
        with self._reporting:
            self.terminated = True
        self._cancel(self.task_id)

    def recall(self, task: Task, parameters: GenerationRequest) -> JobFacts:
        """Return what earlier workers left of the job, if there were any.

        Raises:
            Ignore: it is done already, and was only not acknowledged; or Redis cannot be asked, and it goes back.
            DeliveryLimitExceeded: too many workers died with it on their devices.
        """
        self._digest = hashlib.sha256(json.dumps(parameters.to_json(), sort_keys=True).encode()).digest()
        if self._deliveries is None or not self.request.delivery_info.get("redelivered"):
            return JobFacts()
        try:
            self._end_if_done(task)
            facts = self._deliveries.job_facts(self.task_id)
        except (OSError, RedisError) as exc:
            logger.warning("the history of task %s could not be read, it goes back to its queue: %s", self.task_id, exc)
            raise self._go_back() from exc
        if len(facts.died_on) >= self._max_deliveries:
            raise DeliveryLimitExceeded(
                f"the job was on the devices of {len(facts.died_on)} workers when they died, hung or were lost"
                f" ({', '.join(facts.died_on[:_MOST_HOSTS_NAMED])}); sdtpu_max_deliveries allows {self._max_deliveries}"
            )
        state_of_it = facts.snapshot or b""
        is_ours = state_of_it.startswith(self._digest)
        return JobFacts(facts.died_on, state_of_it[len(self._digest) :] if is_ours else None)

    def _end_if_done(self, task: Task) -> None:
        """Leave it at a stored result: the worker died between storing it and acknowledging."""
        if task.request.ignore_result:
            return
        meta = task.backend.get_task_meta(self.task_id, cache=False)
        if meta["status"] not in READY_STATES:
            return
        logger.info("task %s is done already (%s): acknowledged without running again", self.task_id, meta["status"])
        if task.request.chord:  # counted by its index, so once
            task.backend.on_chord_part_return(task.request, meta["status"], meta["result"])
        raise Ignore

    def let_go(self) -> None:
        """Make sure that the message of a job that has ended is not held for ever.

        It is acknowledged or given back by now, unless that failed: then it comes again when its lease ends.
        """
        if self._deliveries is not None:
            self._deliveries.let_go(self.request.message.delivery_tag)

    def begin(self, task: Task) -> None:
        """Store the state STARTED, unless the job was terminated; what Celery does for `track_started`."""
        self._store_state(task, STARTED, {"pid": os.getpid(), "hostname": task.request.hostname})

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
        self._store_state(task, "PROGRESS", meta)

    def _store_state(self, task: Task, name: str, meta: dict[str, Any]) -> None:
        with self._reporting:
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
                self._deliveries.suspect(self.request.message.delivery_tag)
            logger.info("task %s goes back to its queue: another worker goes on with it", self.task_id)
            raise self._go_back() from None
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

    def _go_back(self) -> Ignore:
        """Have the message given back when the thread has ended."""
        self.request.goes_back = True
        return Ignore()

    def _save(self, snapshot: Any) -> None:
        """Keep a state for the next worker; without it the job starts anew there."""
        if snapshot is None or self._deliveries is None:
            return
        try:
            self._deliveries.save_snapshot(self.task_id, self._digest + snapshot.to_bytes())
        except (OSError, RedisError) as exc:
            logger.warning("the state of task %s could not be kept, it starts anew: %s", self.task_id, exc)

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
