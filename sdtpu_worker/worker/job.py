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
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.states import READY_STATES, STARTED
from celery.worker.state import task_ready
from redis.exceptions import RedisError

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.client.stored_state import UNREADABLE, keeps_results
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue, Progress
from sdtpu_worker.errors import DeliveryLimitExceeded, EngineUnavailable, StorageError
from sdtpu_worker.operations.prompt_guard import describe
from sdtpu_worker.worker.celery_request import is_revoked
from sdtpu_worker.worker.job_ends import JobLeft
from sdtpu_worker.worker.job_record import JobRecord
from sdtpu_worker.worker.running_state import store_running_state

if TYPE_CHECKING:
    from celery import Task

    from sdtpu_worker.worker.serving import Serving

logger = logging.getLogger(__name__)

_MOST_HOSTS_NAMED = 20
_REVOKED, _EXPIRED = ("revoked", "waiting"), ("expired", "")
_PAUSE_S = 1.0
"""How long a job holds its message whose history cannot be read now, before the message is requeued."""


class DeviceJob:
    """What the pool knows of a task that it runs; used by the task's own thread, terminated from any.

    Args:
        request: Celery's request.
        serving: runs the job on the devices.
        soft_time_limit_s, time_limit_s: from the time when the job has its slot; None for none.
        on_time_limit: Celery's own handling of a hard time limit.
        deliveries: the messages that the worker holds, if its broker is Redis.
        max_deliveries: after how many crashes with this job on the devices it fails.
        is_stopping: says whether the worker takes no more jobs.
        record: where the job is measured; None for one of its own.

    Attributes:
        terminated: the client has asked for the job to be terminated.
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
        is_stopping: Callable[[], bool] = lambda: False,
        record: JobRecord | None = None,
    ) -> None:
        self.request, self.serving = request, serving
        self.soft_time_limit_s, self.time_limit_s = map(_positive_seconds, (soft_time_limit_s, time_limit_s))
        self._on_time_limit = on_time_limit
        self._deliveries, self._max_deliveries = deliveries, max_deliveries
        self._is_stopping = is_stopping
        self._signum: Any = None
        self._digest, self._facts = b"", JobFacts()
        self.record = record or JobRecord(request.id)
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
            may_expire=not self.request.had_its_slot,
            soft_time_limit_s=self.soft_time_limit_s or math.inf,
            time_limit_s=self.time_limit_s or math.inf,
        )

    def may_start(self) -> bool:
        """Return whether the job is still wanted; asked until it has its slot. Any thread."""
        return not (self.terminated or is_revoked(self.request))

    def terminate(self, signum: Any = None) -> None:
        """Take the job off its slot at the next tick; its own thread then announces that it is revoked. Any thread.

        It never waits: the job's thread may be storing a state, for as long as the result backend is away.

        Args:
            signum: the signal that the client named; it is announced, and nothing else is done with it.
        """
        self._signum = self._signum if signum is None else signum
        self.terminated = True
        self.serving.loop.cancel(self.task_id)

    def find_early_end(self) -> JobLeft | None:
        """Return how the job ends without running here; None if it is to run. Asked before its task begins.

        The job is done already, and only its message was not acknowledged; or its history cannot be read now; or it is
        not wanted any more.
        """
        is_redelivered = self.request.delivery_info.get("redelivered")
        if is_redelivered:
            self.record.came_from = "requeued"
        if is_redelivered and self._deliveries is not None and (left := self._look_back(self._deliveries)):
            return left
        if self.terminated:
            return self._revoked()
        is_known_to_be_revoked = is_revoked(self.request)  # which a job that has expired is, too, afterwards
        if not self.request.is_unwanted():
            return None
        if is_known_to_be_revoked:
            return JobLeft(self.request.announce_unwanted, *_REVOKED)
        return self._expired()

    def _look_back(self, deliveries: Deliveries) -> JobLeft | None:
        """Read what earlier workers left of the job; return its end if that leaves nothing to do."""
        try:
            meta = self._stored_end()
            self._facts = deliveries.job_facts(self.task_id)
            self.request.had_its_slot = self._facts.snapshot is not None or bool(self._facts.died_on)
            if self.request.had_its_slot:
                self.record.came_from = "died" if self._facts.died_on else "handed_over"
        except Exception as exc:  # each result backend has errors of its own
            logger.warning("the history of task %s could not be read, its message is requeued: %s", self.task_id,
                           describe(exc))  # fmt: skip
            self._pause()  # or the message would be claimed again at once
            return JobLeft(self.request.requeue, "handed_over", "history")
        return None if meta is None else JobLeft(lambda: self._keep(meta), "done_before", meta["status"])

    def recall(self, parameters: GenerationRequest) -> JobFacts:
        """Return what earlier workers left of the job, if there were any.

        Raises:
            DeliveryLimitExceeded: too many workers died with the job on their devices.
        """
        self._digest = hashlib.sha256(json.dumps(parameters.to_json(), sort_keys=True).encode()).digest()
        facts = self._facts
        if len(facts.died_on) >= self._max_deliveries:
            raise DeliveryLimitExceeded(
                f"the job was on the devices of {len(facts.died_on)} workers when they died, hung or were lost"
                f" ({', '.join(facts.died_on[:_MOST_HOSTS_NAMED])}); sdtpu_max_deliveries allows {self._max_deliveries}"
            )
        snapshot = facts.snapshot or b""
        fits = snapshot.startswith(self._digest)  # made for the same parameters
        return JobFacts(facts.died_on, snapshot[len(self._digest) :] or None if fits else None)

    def _stored_end(self) -> dict[str, Any] | None:
        """Return the end of the job that the result backend has already; None if there is none, or nobody knows.

        With `rpc://` results are messages to the client, which a worker cannot read; without a backend there are none.
        """
        backend = self.request.task.backend
        if self.request.ignore_result or not keeps_results(backend):
            return None
        try:
            meta: dict[str, Any] = backend.get_task_meta(self.task_id, cache=False)
            return meta if meta["status"] in READY_STATES and "result" in meta else None
        except UNREADABLE as exc:
            logger.warning("what is stored of task %s is no state, it runs again: %s", self.task_id, describe(exc))
            return None

    def _keep(self, meta: Mapping[str, Any]) -> None:
        """Keep a stored end: the earlier worker died between storing it and acknowledging."""
        logger.info("task %s is done already (%s): acknowledged without running again", self.task_id, meta["status"])
        if self.request.chord:  # counted by its index, so once
            self.request.count_in_chord(meta["status"], meta["result"])
        self.request.announce_stored_end(meta)

    def leave(self, left: JobLeft) -> None:
        """Bring a job to its end whose task's code has ended with `JobLeft`, or has never begun.

        A message whose job's end could not be stored is not acknowledged: it is requeued if the worker stops, and
        redelivered when its lease expires otherwise.
        """
        try:
            left.end()
        except EngineUnavailable:  # the worker stops, and does not wait for the result backend
            self.request.requeue()
        except Exception as exc:  # each result backend has errors of its own
            logger.warning("the end of task %s could not be stored: %s", self.task_id, describe(exc))
        else:
            self.request.acknowledge()
        task_ready(self.request)

    def _pause(self) -> None:
        """Wait a moment, unless the worker stops."""
        until = time.monotonic() + _PAUSE_S
        while time.monotonic() < until and not self._is_stopping():
            time.sleep(0.05)

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
        """Store a state, unless the job was terminated or somebody has stored its end."""
        if self.terminated or task.request.ignore_result:
            return
        try:
            if not store_running_state(task, name, meta):
                logger.debug("the state %s of task %s was not stored: its end is, or another state", name, self.task_id)
        except Exception as exc:  # each result backend has errors of its own; the picture does not depend on it
            logger.debug("the state %s of task %s was not stored: %s", name, self.task_id, exc)

    @contextlib.contextmanager
    def in_celerys_words(self) -> Iterator[None]:
        """Turn what the device loop raises for this job into what Celery does for any task.

        Raises:
            JobLeft: the job has no result of its own here.
            SoftTimeLimitExceeded: its soft time limit is over.
            StorageError: its image could not be stored, and the worker does not stop.
        """
        try:
            yield
        except (JobHandedOver, EngineUnavailable) as exc:
            if self.terminated:
                raise self._revoked() from None
            self._save(exc)
            is_suspect = getattr(exc, "suspect", False)
            if is_suspect and self._deliveries is not None:
                self._deliveries.mark_suspect(self.request.message.delivery_tag)
            logger.info("task %s is handed over: its message is requeued and another worker continues it", self.task_id)
            raise JobLeft(self.request.requeue, "handed_over", "devices" if is_suspect else "stopping") from None
        except (JobCancelled, JobOverdue) as exc:
            reason = exc.reason if isinstance(exc, JobOverdue) else None
            if self.terminated:
                raise self._revoked() from None
            if reason is Overdue.SOFT_TIME_LIMIT:
                raise SoftTimeLimitExceeded(self.soft_time_limit_s) from None
            if reason is Overdue.TIME_LIMIT and self._on_time_limit and self.time_limit_s:
                on_limit = partial(self._on_time_limit, False, self.time_limit_s)
                raise JobLeft(on_limit, "failed", TimeLimitExceeded.__name__) from None
            if reason is Overdue.EXPIRED:
                raise self._expired() from None
            raise JobLeft(self.request.announce_unwanted, *_REVOKED) from None
        except StorageError:
            if self.terminated:
                raise self._revoked() from None
            if not self._is_stopping():
                raise
            self.remember_slot()
            logger.warning("the image of task %s could not be stored before the worker stops: its message is requeued",
                           self.task_id)  # fmt: skip
            raise JobLeft(self.request.requeue, "handed_over", "storage") from None
        if self.terminated:
            raise self._revoked()

    def _revoked(self) -> JobLeft:
        """Return the end of a job that was terminated."""
        return JobLeft(lambda: self.request.announce_terminated(self._signum), "revoked", "terminated")

    def _expired(self) -> JobLeft:
        """Return the end of a job that has expired before it had a slot."""
        return JobLeft(lambda: self.request.announce_expired(self._deliveries), *_EXPIRED)

    def _save(self, end: JobHandedOver | EngineUnavailable) -> None:
        """Keep a snapshot for the next worker; without one the job starts anew there."""
        snapshot = getattr(end, "snapshot", None)
        if snapshot is not None:
            self._keep_for_next(snapshot.to_bytes())
        elif getattr(end, "had_slot", False):
            self.remember_slot()

    def remember_slot(self) -> None:
        """Have the next worker know that the job had its slot in time, so that it does not expire there."""
        if self.request.expires and not self._facts.snapshot:  # a snapshot says it too
            self._keep_for_next(b"")

    def _keep_for_next(self, snapshot: bytes) -> None:
        if self._deliveries is None:
            return
        try:
            self._deliveries.save_snapshot(self.task_id, self._digest + snapshot)
        except (OSError, RedisError) as exc:
            logger.warning("the snapshot of task %s could not be kept, the job starts anew: %s", self.task_id, exc)


def _positive_seconds(limit: Any) -> float | None:
    """Return a time limit if it is one: Celery's remote control takes any value for it."""
    return limit if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0 else None


def _data_uri(pixels: Any) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
