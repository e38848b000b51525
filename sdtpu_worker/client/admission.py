"""Overload protection where jobs are enqueued: workers report their load, clients refuse what would wait too long.

Advisory: reports are a few seconds old, two clients can pass the check at the same time, and a client that has only
Celery does not ask at all. A job is refused for its deadline only when it is clear, see `MARGIN`.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.broker_errors import plain_client
from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.load_report import WorkerLoad, estimated_start_s, living_loads, load_key
from sdtpu_worker.contract.queues import shard_queues
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.errors import DeadlineUnreachable, QueueFull

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

MARGIN = 1.5
"""A job is refused when its estimated start is later than this many times the seconds that it has until it expires.

The estimate takes every job ahead for an average one, so it can be off; a job that could have made it is worse to
refuse than one to let in that expires in the queue, which is what happens without a check.
"""


def messages_ahead(lengths: Mapping[str, Sequence[int]], queue: str, step: int) -> int:
    """Return how many messages are taken before a new one.

    Args:
        lengths: of each queue that shares the workers: its lists, the most urgent first.
        queue: where the new message goes.
        step: which of the lists.
    """
    position = lengths[queue][step]
    more_urgent = sum(sum(lists[:step]) for lists in lengths.values())
    return more_urgent + sum(min(lists[step], position) for lists in lengths.values())  # queues are served in turn


def admit(
    app: Celery,
    request: GenerationRequest,
    queue: str,
    priority: int,
    expires_s: float | None = None,
    producer: Any = None,
) -> None:
    """Return when a job may be enqueued; asks Redis only when there is something that could refuse it.

    Args:
        app: the client's app.
        request: the job.
        queue: where it goes.
        priority: lower is more urgent.
        expires_s: seconds after which it is not wanted unless it has a slot; None for no deadline.
        producer: the kombu producer that will send it, if the caller has one.

    Raises:
        QueueFull: `sdtpu_max_queue` messages or more of its priority or a more urgent one wait in its queue.
        DeadlineUnreachable: its estimated start is later than `MARGIN` times `expires_s`.
    """
    limit = read_setting("sdtpu_max_queue", app.conf)
    if not limit and expires_s is None:
        return
    main = read_setting("sdtpu_queue", app.conf)
    family = shard_queues(main, read_setting("sdtpu_tenant_shards", app.conf))
    queues, of = (family, main) if queue in family else ([queue], queue)
    seen = _look(app, of, queues, priority, producer)
    if seen is None:
        return
    loads, lengths, step = seen
    waiting, ahead = sum(lengths[queue][: step + 1]), messages_ahead(lengths, queue, step)
    start_s = estimated_start_s(loads, ahead, priority, expires_s is not None)
    eta_s = None if start_s is None else round(start_s + fmean(load.job_s(request) for load in loads), 2)
    if limit and waiting >= limit:
        when = "no worker has said how fast it is" if eta_s is None else f"it would be done in {_text(eta_s)}"
        raise QueueFull(
            f"the job was not enqueued: {waiting:,} jobs wait ahead of it in the queue {queue!r}, at most"
            f" {limit:,} may (sdtpu_max_queue); {when}; try again later, add workers or raise the limit",
            eta_s,
        )
    if expires_s is not None and start_s is not None and start_s > MARGIN * max(expires_s, 0.0):
        raise DeadlineUnreachable(
            f"the job was not enqueued: it expires in {_text(expires_s)}, but would have a slot only in"
            f" {_text(start_s)}, since {ahead:,} jobs are ahead of it in {of!r} and {len(loads)} workers have"
            f" {sum(load.num_slots for load in loads)} slots; give it a longer `expires` or a lower `priority`"
            " number, try again later or add workers",
            eta_s,
        )


def _look(
    app: Celery, of: str, queues: Sequence[str], priority: int, producer: Any
) -> tuple[list[WorkerLoad], dict[str, list[int]], int] | None:
    """Read loads and lengths of lists in one round trip, and which list is the job's; None when that cannot be."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    try:
        with app.connection_or_acquire(producer.connection if producer else None) as connection:
            if connection.transport.driver_type != "redis":
                return None
            if not connection.connected:  # on its own, `default_channel` would try for six seconds
                connection.ensure_connection(max_retries=len(connection.alt) or 1, interval_start=0)
            channel = connection.default_channel
            steps = list(channel.priority_steps)
            with channel.conn_or_acquire() as client:
                redis, prefix = plain_client(client)
                pipeline = redis.pipeline(transaction=False).time().hgetall(prefix + load_key(of))
                for queue in queues:
                    for step in steps:
                        pipeline.llen(prefix + channel._q_for_pri(queue, step))
                now_s, reports, *lengths = pipeline.execute()
    except (OperationalError, RedisError, OSError) as exc:
        logger.warning("enqueuing without a look at the load of %s: %s", of, exc)
        return None
    rows = {queue: lengths[i * len(steps) : (i + 1) * len(steps)] for i, queue in enumerate(queues)}
    return living_loads(reports, now_s), rows, max(0, bisect(steps, priority) - 1)


def _text(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
