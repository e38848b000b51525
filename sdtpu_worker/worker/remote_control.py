"""Celery's remote control, where it can end a worker: two commands do their work outside their own error handling.

`add_consumer` and `cancel_consumer` only schedule it in the event loop, where any exception (a queue named 7) would be
the end of the process. Every other command answers with its error.
"""

from __future__ import annotations

import logging
from typing import Any

from sdtpu_worker.delivery.envelope import is_usable_id

logger = logging.getLogger(__name__)

_EXCHANGE_TYPES = (None, "direct", "topic", "fanout")


def guard(consumer: Any) -> None:
    """Let both commands fail without harm; Celery's consumer, its main thread."""
    add, cancel = type(consumer).add_task_queue, type(consumer).cancel_task_queue

    def add_task_queue(
        queue: Any, exchange: Any = None, exchange_type: Any = None, routing_key: Any = None, **options: Any
    ) -> None:
        names = [name for name in (queue, exchange, routing_key) if name is not None]
        if queue is None or not all(map(is_usable_id, names)) or exchange_type not in _EXCHANGE_TYPES:
            logger.error("add_consumer: queue, exchange and routing_key must be names, got %s", ascii(names)[:200])
            return
        try:
            add(consumer, queue, exchange, exchange_type, routing_key, **options)
        except (TypeError, ValueError, AttributeError, KeyError) as exc:
            logger.error("add_consumer: the queue %s cannot be consumed: %r", ascii(queue), exc)
            consumer.app.amqp.queues.deselect(queue)

    def cancel_task_queue(queue: Any) -> None:
        if not is_usable_id(queue):
            logger.error("cancel_consumer: queue must be a name, got %s", ascii(queue)[:200])
            return
        cancel(consumer, queue)

    consumer.add_task_queue, consumer.cancel_task_queue = add_task_queue, cancel_task_queue
