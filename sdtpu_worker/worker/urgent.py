"""Urgent jobs past the prefetch limit: a worker whose hands are full of less urgent ones still sees them.

Celery takes no message beyond the pool's capacity, so a job of higher priority would wait in Redis until one of lower
priority is done. `UrgentPrefetch` looks at the lists of higher priority and takes what is there, one credit each; the
policy then gives it the slot of a job of lower priority, and the credit is taken back when a job ends.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from redis.exceptions import ResponseError

from sdtpu_worker.contract.queues import plain_client, waiting_lists
from sdtpu_worker.delivery.transport import ClaimingChannel

logger = logging.getLogger(__name__)


class UrgentPrefetch:
    """Lends credits to urgent jobs; `look` runs on the worker's main thread, `on_job_end` on the jobs' threads.

    Args:
        consumer: Celery's consumer.
        pool: the `DevicePool`.
    """

    def __init__(self, consumer: Any, pool: Any) -> None:
        self._consumer, self._pool = consumer, pool
        self._lock, self._lent = threading.Lock(), 0

    def look(self) -> None:
        """Lend a credit for every urgent job that waits in Redis, as long as there are slots to take."""
        lowest = self._pool.services.serving.loop.lowest_priority_running
        channel: Any = self._consumer.task_consumer.channel
        is_claiming = isinstance(channel, ClaimingChannel)
        if lowest is None or not is_claiming or channel.qos.can_consume():
            return
        urgent_bands = sum(band < channel.priority(lowest) for band in channel.priority_steps)
        if not urgent_bands:
            return
        with channel.conn_or_acquire() as client:
            redis, prefix = plain_client(client)
            lengths = redis.pipeline(transaction=False)
            for queue in channel.task_queues:  # all whose jobs the worker takes, those of tenants too
                for name in waiting_lists(channel, queue, prefix)[:urgent_bands]:
                    lengths.llen(name)
            try:
                waiting = sum(lengths.execute())
            except ResponseError:  # the claims meet the same error and tell of it
                return
        with self._lock:
            count = min(waiting, self._pool.services.serving.num_slots) - self._lent
            if count <= 0:
                return
            self._lent += count
            self._consumer.qos.increment_eventually(count)
        logger.info("%d urgent jobs wait in Redis: taking them past the prefetch limit", waiting)

    def on_job_end(self) -> None:
        """Take a credit back."""
        with self._lock:
            if self._lent:
                self._lent -= 1
                self._consumer.qos.decrement_eventually()
