"""What Redis knows of the task, under the names that `operations/metric_table.py` has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdtpu_worker.client.queue_state import BrokerState, read_broker
from sdtpu_worker.client.waiting import Waiting

if TYPE_CHECKING:
    from celery import Celery

Figures = dict[str, float | dict[tuple[str, ...], float]]
"""Values by the name of a figure; of one with labels, by the values of these in the order of the table."""

_MOST_HOSTS, _MOST_KINDS = 1000, 50


def waiting_figures(queues: Mapping[str, Waiting]) -> Figures:
    """Return what waits in the queues, for a worker and for `sdtpu metrics` alike."""
    return {
        "sdtpu_requests_waiting": {
            (queue, str(band)): count for queue, waiting in queues.items() for band, count in waiting.counts.items()
        },
        "sdtpu_oldest_request_seconds": {
            (queue,): waiting.oldest_s for queue, waiting in queues.items() if waiting.oldest_s is not None
        },
    }


def read_figures(app: Celery) -> Figures:
    """Return what `sdtpu metrics` and the door's `/metrics` export, read from Redis now; no worker has to run.

    Args:
        app: an app of a client or a worker.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    return broker_figures(read_broker(app))


def broker_figures(state: BrokerState) -> Figures:
    """Return the figures of what was read from Redis."""
    dead = sorted(state.dead_letters.items(), key=lambda letters: -letters[1])[:_MOST_KINDS]
    workers = state.workers[:_MOST_HOSTS]
    return {
        **waiting_figures({queue.queue: Waiting(queue.waiting, queue.oldest_s) for queue in state.queues}),
        "sdtpu_requests_held": {(queue.queue,): queue.held for queue in state.queues},
        "sdtpu_requests_deferred": {(queue.queue,): queue.deferred for queue in state.queues},
        "sdtpu_queue_wait_estimate_seconds": {(queue,): seconds for queue, seconds in state.wait_s.items()},
        "sdtpu_workers": len(state.workers),
        "sdtpu_host_slots": {(worker.host,): worker.num_slots for worker in workers},
        "sdtpu_host_requests_held": {(worker.host,): sum(worker.held.values()) for worker in workers},
        "sdtpu_host_job_seconds": {(worker.host,): worker.mean_job_s for worker in workers},
        "sdtpu_redis_memory_bytes": {(kind,): number for kind, number in state.memory.items()},
        "sdtpu_dead_letters_total": {(kind,): count for kind, count in dead},
    }
