"""What runs and what waits at this moment: the slots of all workers, and how many jobs are ahead of one in its queue.

kombu's lists do not say where in them a message is. Their messages are in the order in which they were sent and say
when that was, so a few of them, at places spread evenly over a list, tell how many are older than a job: exactly in a
list of at most `MOST_SAMPLES`, and else to within the distance of two samples. No job's message has to be searched for.
"""

from __future__ import annotations

import re
from bisect import bisect, bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.admission import messages_ahead
from sdtpu_worker.client.queue_state import open_broker
from sdtpu_worker.client.routing import reporting_queues
from sdtpu_worker.client.waiting import as_text
from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.load_report import WorkerLoad, estimated_start_s, living_loads, load_key
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY, SENT_AT_HEADER, read_sent_at, tenant_queue
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.contract.slot_report import SlotReport, living_slot_reports, slots_key

if TYPE_CHECKING:
    from celery import Celery

MOST_SAMPLES = 64
"""How many messages of a list are looked at."""
_SENT_AT = re.compile(rf'"{SENT_AT_HEADER}": ?([0-9.]+)'.encode())


@dataclass(frozen=True)
class Line:
    """A Redis list in which messages wait.

    Attributes:
        length: how many messages it has.
        samples: `(place, sent_at)` of some of them, the next one first: its place is 0; seconds since 1970.
    """

    length: int
    samples: Sequence[tuple[int, float]] = ()

    def ahead(self, sent_at: float) -> int | None:
        """Return how many messages are ahead of one that was sent then; None if no message is as young.

        Messages of many clients are not strictly in order, so one that is among the samples itself counts first.
        """
        for place, at in self.samples:
            if at == sent_at:
                return place
        number = bisect_left(self.samples, sent_at, key=lambda sample: sample[1])
        return self.samples[number][0] if number < len(self.samples) else None


@dataclass(frozen=True)
class Wait:
    """How long a job that waits in Redis will wait.

    Attributes:
        ahead: how many messages workers take before it.
        eta_s: seconds until its image should be there; None where no worker has published its load.
    """

    ahead: int
    eta_s: float | None


@dataclass(frozen=True)
class LiveState:
    """What the queues and workers of the task are at.

    Attributes:
        queue: `sdtpu_queue`.
        shards: `sdtpu_tenant_shards`.
        bands: the lowest priority of each band.
        lines: of each queue, its lists, the most urgent first.
        workers: the load reports of the workers that are alive.
        slots: their slot reports, by host; a worker of an earlier version has none.
    """

    queue: str
    shards: int
    bands: Sequence[int]
    lines: Mapping[str, Sequence[Line]]
    workers: Sequence[WorkerLoad]
    slots: Mapping[str, SlotReport]

    @property
    def waiting(self) -> int:
        """How many jobs wait in Redis."""
        return sum(line.length for lines in self.lines.values() for line in lines)

    def find_wait(self, parameters: Mapping[str, Any], tenant: str | None, sent_at: float) -> Wait | None:
        """Return how long a job will wait; None where that is not known, or it does not wait in Redis any more.

        Args:
            parameters: of `generate`, with `priority` and `expires` where the job has its own.
            tenant: the job's.
            sent_at: what the job's message says of when it was sent, in seconds since 1970.
        """
        queue = tenant_queue(self.queue, tenant, self.shards)
        priority = int(parameters.get("priority", DEFAULT_PRIORITY))
        band = max(0, bisect(self.bands, priority) - 1)
        if queue not in self.lines or (place := self.lines[queue][band].ahead(sent_at)) is None:
            return None
        lengths = {name: [line.length for line in lines] for name, lines in self.lines.items()}
        lengths[queue][band] = place
        ahead = messages_ahead(lengths, queue, band)
        start_s = estimated_start_s(self.workers, ahead, priority, "expires" in parameters)
        if start_s is None:
            return Wait(ahead, None)
        kwargs = {name: value for name, value in parameters.items() if name not in ("priority", "expires")}
        request = GenerationRequest.parse((), kwargs)
        return Wait(ahead, round(start_s + fmean(worker.job_s(request) for worker in self.workers), 1))


def read_live_state(app: Celery) -> LiveState:
    """Return what the queues and workers are at, read from Redis in two round trips.

    A Redis user without the right to look at messages (`+lindex`) learns no places: `find_wait` then returns None.

    Args:
        app: an app of a client or a worker.

    Raises:
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
    """
    main, shards = read_setting("sdtpu_queue", app.conf), read_setting("sdtpu_tenant_shards", app.conf)
    with open_broker(app) as (redis, prefix, queues, bands):
        reporting = reporting_queues(app, queues)
        names = [name for lists in queues.values() for name in lists]
        pipeline = redis.pipeline(transaction=False).time()
        for queue in reporting:
            pipeline.hgetall(prefix + load_key(queue))
        for name in names:
            pipeline.llen(name)
        now_s, *rest = pipeline.execute()
        loads = {queue: living_loads(rest[i], now_s) for i, queue in enumerate(reporting)}
        lengths = dict(zip(names, (int(length) for length in rest[len(reporting) :]), strict=True))
        lines, slots = _look_closer(redis, prefix, lengths, loads)
    return LiveState(
        queue=main,
        shards=shards,
        bands=list(bands),
        lines={queue: [lines[name] for name in lists] for queue, lists in queues.items()},
        workers=[load for each in loads.values() for load in each],
        slots=slots,
    )


def _look_closer(
    redis: Any, prefix: str, lengths: Mapping[str, int], loads: Mapping[str, Sequence[WorkerLoad]]
) -> tuple[dict[str, Line], Mapping[str, SlotReport]]:
    """Read samples of the lists, and the slot reports of the workers."""
    hosts = [(queue, load.host) for queue, of_queue in loads.items() for load in of_queue]
    places = [(name, place) for name, length in lengths.items() for place in sample_places(length)]
    pipeline = redis.pipeline(transaction=False)
    for queue, host in hosts:
        pipeline.get(prefix + slots_key(queue, host))
    for name, place in places:
        pipeline.lindex(name, -1 - place)  # workers take the last one next
    found = pipeline.execute(raise_on_error=False) if hosts or places else []
    texts = [None if isinstance(each, Exception) else each for each in found]
    slots = living_slot_reports([host for _, host in hosts], texts[: len(hosts)])
    samples: dict[str, list[tuple[int, float]]] = {name: [] for name in lengths}
    for (name, place), message in zip(places, texts[len(hosts) :], strict=True):
        if (sent_at := _sent_at(message)) is not None:
            samples[name].append((place, sent_at))
    return {name: Line(length, samples[name]) for name, length in lengths.items()}, slots


def sample_places(length: int) -> Iterator[int]:
    """Yield the places of a list that are looked at: all of a short one, evenly spread ones of a long one."""
    if length <= MOST_SAMPLES:
        yield from range(length)
        return
    for number in range(MOST_SAMPLES):
        yield number * (length - 1) // (MOST_SAMPLES - 1)


def _sent_at(message: bytes | str | None) -> float | None:
    if message is None:
        return None
    match = _SENT_AT.search(message if isinstance(message, bytes) else as_text(message).encode())
    try:
        return None if match is None else read_sent_at(float(match[1]))
    except ValueError:
        return None
