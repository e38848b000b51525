"""Looks now and then at what waits in the queues that this worker consumes, for `/metrics`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import RedisError

from sdtpu_worker.client.queue_figures import waiting_figures
from sdtpu_worker.client.waiting import Waiting, read_waiting
from sdtpu_worker.contract.queues import waiting_lists
from sdtpu_worker.operations.figures import Readings

logger = logging.getLogger(__name__)


class QueueWatch:
    """What waits in the queues, as of the last look. `look` runs in the lease's thread, `figures` in any.

    Args:
        most_stale_s: how old the last look may be: nothing is said of the queues afterwards.
        clock: monotonic seconds.
    """

    def __init__(self, most_stale_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_stale_s, self._clock = most_stale_s, clock
        self._lists: Mapping[str, Sequence[str]] = {}
        self._bands: Sequence[int] = ()
        self._seen: tuple[Mapping[str, Waiting], float] = {}, -math.inf

    def follow(self, consumer: Any, prefix: str) -> None:
        """Look at the queues of Celery's consumer from now on. The worker's main thread.

        Args:
            consumer: Celery's consumer.
            prefix: kombu's `global_keyprefix`.
        """
        channel = consumer.task_consumer.channel
        names = [queue.name for queue in consumer.task_consumer.queues]
        self.follow_lists({name: waiting_lists(channel, name, prefix) for name in names}, list(channel.priority_steps))

    def follow_lists(self, lists: Mapping[str, Sequence[str]], bands: Sequence[int]) -> None:
        """Look at these lists from now on.

        Args:
            lists: of each queue, one for each band.
            bands: the lowest priority of each band.
        """
        self._lists, self._bands = lists, bands

    def look(self, redis: Any) -> None:
        """Read what waits now; an error of Redis is logged at DEBUG, not raised."""
        try:
            self._seen = read_waiting(redis, self._lists, self._bands), self._clock()
        except RedisError as exc:  # no permission, a key of another type
            logger.debug("the lengths of the queues could not be read: %s", exc)

    def figures(self) -> Readings:
        """Return what waits; nothing where the last look is too long ago."""
        waiting, seen_at = self._seen
        return waiting_figures(waiting) if self._clock() - seen_at < self._most_stale_s else {}
