"""Celery's own request of a message, for a job on the devices: which may be requeued, with its snapshot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from billiard.common import TERM_SIGNAME
from celery.platforms import signals
from celery.states import FAILURE, REVOKED, SUCCESS
from celery.utils.functional import maybe_list
from celery.utils.saferepr import saferepr
from celery.worker import state
from celery.worker.request import Request

from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.transport import ClaimingChannel
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.operations.prompt_guard import describe

logger = logging.getLogger(__name__)

current_job: ContextVar[Any] = ContextVar("sdtpu_current_job", default=None)
"""The `DeviceJob` that the calling thread runs; None in any other thread. (Celery would take a job among a task's own
fields for a header, and could not send the task again: `retry`.)"""


class DeviceRequest(Request):
    """Celery's request for a message of `sdtpu.generate`.

    Attributes:
        is_requeued: when the job's thread has ended, the message is requeued instead of acknowledged.
        had_its_slot: the job had its slot on another worker, in time; it does not expire any more.
        failures_outside: how often Celery failed around the task's own code. The first time it stores that error as
            the task's result; the second time it says that it could not.
    """

    is_requeued = False
    had_its_slot = False
    failures_outside = 0

    def acknowledge(self) -> None:
        """Acknowledge the message, or requeue it.

        A message whose job could store no state at all is neither: its lease expires and it is redelivered.
        """
        if self.is_requeued:
            self.reject(requeue=True)
        elif self.failures_outside < 2:
            super().acknowledge()

    def revoked(self) -> bool:
        """Return whether the job is known to be revoked or expired.

        Celery's main thread asks, and would store the new state at once: for as long as the result backend is away,
        it would answer nobody. For a message that was claimed the job's own thread looks (`is_unwanted`) and stores.
        """
        if isinstance(self.message.channel, ClaimingChannel):
            return self._already_revoked
        return super().revoked()

    def maybe_expire(self) -> bool:
        """Return whether the job has expired before it had a slot; Celery's own means before it began."""
        return not self.had_its_slot and bool(super().maybe_expire())

    def is_unwanted(self) -> bool:
        """Return whether the job is revoked, or has expired; nothing is stored or announced."""
        return is_revoked(self) or self.maybe_expire()

    def announce_unwanted(self, is_expired: bool = False) -> None:
        """Store and announce that the job is revoked, or expired before it had a slot.

        Args:
            is_expired: it has expired, though its clock here may be a moment behind.
        """
        if not super().revoked():
            self._announce_revoked("expired" if is_expired else "revoked", False, None, is_expired)

    def announce_expired(self, deliveries: Deliveries | None) -> None:
        """Store and announce that the job expired before it had a slot; for a message of another worker, do nothing.

        While this process stood still its lease may have expired. The worker that has the message now may have given
        the job its slot in time.

        Args:
            deliveries: the messages that this worker holds, if its broker is Redis.

        Raises:
            redis.exceptions.RedisError: nobody knows who has the message.
        """
        if deliveries is not None and deliveries.is_lost(self.message.delivery_tag):
            logger.info("task %s has expired here, and its message was redelivered: another worker ends it", self.id)
            self.requeue()
        else:
            self.announce_unwanted(is_expired=True)

    def announce_terminated(self, signum: Any) -> None:
        """Store and announce that the job was terminated: what Celery does in its main thread."""
        if not self._already_revoked:
            self._announce_revoked("terminated", True, signum, False)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Have the pool take the job off its slot; the job's thread then announces it (`announce_terminated`).

        A request that the pool does not have yet ends as revoked when the pool gets it: its id is among the revoked.
        """
        if getattr(pool, "holds_devices", False):
            pool.terminate_job_of(self, signals.signum(signal or TERM_SIGNAME))
        else:
            super().terminate(pool, signal)

    def requeue(self) -> None:
        """Have the message go back to the front of its queue instead of being acknowledged."""
        self.is_requeued = True
        self.acknowledge()

    def count_in_chord(self, state: str, result: Any) -> None:
        """Count the job's end in the chord that it is a part of."""
        self.task.backend.on_chord_part_return(self._context, state, result)

    def announce_stored_end(self, meta: Mapping[str, Any]) -> None:
        """Send the event of an end that an earlier worker stored: nobody may have heard of it.

        Args:
            meta: what the result backend has of the task.
        """
        result = saferepr(meta["result"], self.task.resultrepr_maxsize)
        if meta["status"] == SUCCESS:
            self.send_event("task-succeeded", result=result, runtime=None)
        elif meta["status"] == FAILURE:
            self.send_event("task-failed", exception=result, traceback=meta.get("traceback"))
        elif meta["status"] == REVOKED:
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Have the pool hand all its jobs over: Celery asks for this in a cold shutdown, for every job."""
        pool.hand_over()


def is_revoked(request: Any) -> bool:
    """Return whether a job was revoked, by its id or by a stamp that it bears."""
    return request.id in state.revoked or any(
        stamp in state.revoked_stamps
        and any(each in maybe_list(state.revoked_stamps[stamp]) for each in maybe_list(value) or ())
        for stamp, value in request.stamps.items()
    )


def count_failure_outside_task(sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
    """Take note that Celery failed around a task's code; mostly, the result backend took no state.

    A receiver of Celery's signal `task_internal_error`, in the job's thread.
    """
    job = current_job.get()
    if job is not None and job.task_id == task_id:
        celery_request: DeviceRequest = job.request
        celery_request.failures_outside += 1
        if isinstance(exception, EngineUnavailable):  # the worker stops, and does not wait for the result backend
            celery_request.is_requeued = True
            job.remember_slot()
        logger.warning("the state of task %s could not be stored: %s", celery_request.id, describe(exception))


def answer_directly(request: Request) -> None:
    """Have a request acknowledge from the thread that runs it.

    Celery leaves that to its event loop, which has ended by the time a stopping worker's last jobs do.
    """
    message = request.message
    if isinstance(message.channel, ClaimingChannel):
        request._on_ack, request._on_reject = message.ack_log_error, message.reject_log_error
