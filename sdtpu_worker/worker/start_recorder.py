"""Writes down in Redis which jobs get a slot, before they do, in case this worker dies of one of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sdtpu_worker.delivery.deliveries import Deliveries

logger = logging.getLogger(__name__)

_TIMEOUT_S, _ALONE_TIMEOUT_S = 0.05, 0.25


class StartRecorder:
    """Writes in a thread of its own, for which the device loop waits only briefly.

    Args:
        deliveries: what knows how to write the record.
    """

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sdtpu-starts")
        self._writing: Future[None] | None = None

    def record(self, task_ids: Sequence[str], alone: bool) -> None:
        """Write down who gets a slot; a Redis that does not answer soon is not waited for. The device loop's thread.

        While an earlier answer is due, the loop waits only for a job that starts alone, a suspect; the others are
        written down when Redis gets to it.

        Args:
            task_ids: the jobs that get a slot.
            alone: no other job has a slot.
        """
        is_slow = self._writing is not None and not self._writing.done()
        self._writing = self._thread.submit(self._deliveries.record_starts, list(task_ids), alone)
        try:
            if alone or not is_slow:
                self._writing.result(_ALONE_TIMEOUT_S if alone else _TIMEOUT_S)
        except Exception as exc:  # a time-out, or the driver's own errors
            logger.debug("the starts of %d jobs were not recorded in time: %r", len(task_ids), exc)

    def close(self) -> None:
        """End the thread; what it has not written is not written."""
        self._thread.shutdown(wait=False, cancel_futures=True)
