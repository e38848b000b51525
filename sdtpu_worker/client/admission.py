"""Overload protection where jobs are enqueued: a client refuses a job that would wait too long.

Workers publish load reports, from which the client estimates when the job would have a slot. The check is advisory:
reports are a few seconds old, two clients can pass the check at the same time, and a client that has only Celery does
not check at all. A job is refused for its deadline only in a clear case, see `MARGIN`.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.load_report import WorkerLoad, estimated_start_s, living_loads, load_key
from sdtpu_worker.contract.queues import plain_client, shard_queues, waiting_lists
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.errors import DeadlineUnreachable, QueueFull

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

MARGIN = 1.5
"""A job is refused when its estimated start is later than this many times the seconds until it expires.

The estimate takes every job ahead for an average one, so it can be wrong. Refusing a job that would have started in
time is worse than enqueueing one that expires in the queue, which is what happens without a check.
"""


@dataclass(frozen=True)
class _Load:
    """What Redis says of the queues that share a job's workers.

    Attributes:
        workers: the load reports of the workers that are alive.
        lengths: of each queue, the number of waiting messages in each band, the most urgent first.
        band: the index of the job's band.
    """

    workers: Sequence[WorkerLoad]
    lengths: Mapping[str, Sequence[int]]
    band: int


def messages_ahead(lengths: Mapping[str, Sequence[int]], queue: str, band: int) -> int:
    """Return how many messages workers take before a new one.

    Args:
        lengths: of each queue that shares the workers, the number of messages in each band, the most urgent first.
        queue: the queue of the new message.
        band: the index of its band.
    """
    position = lengths[queue][band]
    more_urgent = sum(sum(bands[:band]) for bands in lengths.values())
    return more_urgent + sum(min(bands[band], position) for bands in lengths.values())  # queues are served in turn


def check_admission(
    app: Celery,
    request: GenerationRequest,
    queue: str,
    priority: int,
    expires_s: float | None = None,
    producer: Any = None,
) -> None:
    """Return if a job may be enqueued. Asks Redis only where a limit or a deadline could refuse the job.

    Args:
        app: the client's app.
        request: the job's parameters.
        queue: the job's queue.
        priority: lower is more urgent.
        expires_s: seconds until the job expires unless it has a slot; None for no deadline.
        producer: the kombu producer that will send the job, if the caller has one.

    Raises:
        QueueFull: `sdtpu_max_queue` messages or more, of the job's priority or more urgent, wait in its queue.
        DeadlineUnreachable: the job's estimated start is later than `MARGIN` times `expires_s`.
    """
    limit = read_setting("sdtpu_max_queue", app.conf)
    if not limit and expires_s is None:
        return
    main = read_setting("sdtpu_queue", app.conf)
    shards = shard_queues(main, read_setting("sdtpu_tenant_shards", app.conf))
    queues, reported_as = (shards, main) if queue in shards else ([queue], queue)
    load = _read_load(app, reported_as, queues, priority, producer)
    if load is None:
        return
    waiting, ahead = sum(load.lengths[queue][: load.band + 1]), messages_ahead(load.lengths, queue, load.band)
    start_s = estimated_start_s(load.workers, ahead, priority, expires_s is not None)
    eta_s = None if start_s is None else round(start_s + fmean(w.job_s(request) for w in load.workers), 2)
    if limit and waiting >= limit:
        when = "no worker has published its load" if eta_s is None else f"it would be done in {_seconds(eta_s)}"
        raise QueueFull(
            f"the job was not enqueued: {waiting:,} jobs wait ahead of it in the queue {queue!r}, at most"
            f" {limit:,} may (sdtpu_max_queue); {when}; try again later, add workers or raise the limit",
            eta_s,
        )
    if expires_s is not None and start_s is not None and start_s > MARGIN * max(expires_s, 0.0):
        raise DeadlineUnreachable(
            f"the job was not enqueued: it expires in {_seconds(expires_s)}, but would have a slot only in"
            f" {_seconds(start_s)}, since {ahead:,} jobs are ahead of it in {reported_as!r} and"
            f" {len(load.workers)} workers have {sum(w.num_slots for w in load.workers)} slots; give it a longer"
            " `expires` or a lower `priority` number, try again later or add workers",
            eta_s,
        )


def _read_load(app: Celery, reported_as: str, queues: Sequence[str], priority: int, producer: Any) -> _Load | None:
    """Read the load reports and the lengths of all lists in one round trip.

    Args:
        app: the client's app.
        reported_as: the queue under which the workers publish their load.
        queues: the queues that share these workers.
        priority: the job's.
        producer: the kombu producer that will send the job; None takes a connection from the app's pool.

    Returns:
        The load; None when the broker is not Redis or does not answer: the job is then enqueued without a check.
    """
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    try:
        with app.connection_or_acquire(producer.connection if producer else None) as connection:
            if connection.transport.driver_type != "redis":
                return None
            if not connection.connected:  # on its own, `default_channel` would try for six seconds
                connection.ensure_connection(max_retries=len(connection.alt) or 1, interval_start=0)
            channel = connection.default_channel
            bands = list(channel.priority_steps)
            with channel.conn_or_acquire() as client:
                redis, prefix = plain_client(client)
                pipeline = redis.pipeline(transaction=False).time().hgetall(prefix + load_key(reported_as))
                for queue in queues:
                    for name in waiting_lists(channel, queue, prefix):
                        pipeline.llen(name)
                now_s, reports, *lengths = pipeline.execute()
    except (OperationalError, RedisError, OSError) as exc:
        logger.warning("the load of the queue %s could not be read; the job is enqueued without a check: %s",
                       reported_as, exc)  # fmt: skip
        return None
    by_queue = {queue: lengths[i * len(bands) : (i + 1) * len(bands)] for i, queue in enumerate(queues)}
    return _Load(living_loads(reports, now_s), by_queue, max(0, bisect(bands, priority) - 1))


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
