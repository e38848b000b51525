"""One run of `serving.py`: send a schedule to one worker, see every result come, work out the numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import numpy as np

from benchmarks.serving_load import Arrival, Order, producing
from benchmarks.serving_systems import DEVICES, Worker

FULL_BUCKETS = 5 * DEVICES
"""Jobs that four buckets may hold, waiting and running, without being behind."""


@dataclass(frozen=True)
class Run:
    """What one run showed; seconds and shares.

    Attributes:
        load: percent of the limit; None for all jobs at once.
        rate: offered, jobs per second; None for all jobs at once.
        unfinished: jobs without a result when the time was over.
        backlog: jobs that had arrived and were not done when the last one arrived.
        kept_up: every job was done in time, and the backlog was below `FULL_BUCKETS` or a third of the jobs.
        throughput: images per second, from the first arrival to the last result.
        sustained: images per second in the middle two thirds of the results, without the start and the emptying.
        mean_s, p50_s, p95_s, p99_s: latency of the jobs that were done, from the scheduled arrival to the published
            result; the time that there was, if none was.
        occupancy: slots in use, of all slots of the eight devices, over the time with a job in the system.
        waste: share of the computed denoising steps that belong to no job (padding).
        max_late_s: by how much the producer was late, at worst.
    """

    system: str
    mix: str
    load: float | None
    repeat: int
    rate: float | None
    jobs: int
    failed: int
    unfinished: int
    backlog: int
    kept_up: bool
    throughput: float
    sustained: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    occupancy: float
    waste: float
    max_late_s: float
    latencies_s: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dict."""
        return asdict(self)


@dataclass(frozen=True)
class End:
    """A job's end, as it was published: `result` is None for one that failed."""

    at: float
    result: Mapping[str, Any] | None


def measure(
    worker: Worker,
    arrivals: Sequence[Arrival],
    timeout_s: float,
    mix: str,
    load: float | None = None,
    repeat: int = 0,
    rate: float | None = None,
) -> Run:
    """Serve a schedule with one worker.

    Args:
        worker: warm and idle.
        arrivals: the schedule.
        timeout_s: after the producer's start.
        mix, load, repeat, rate: what the run is called.
    """
    order = Order(worker.redis_url, worker.system.queue, [worker.system.message(arrival) for arrival in arrivals])
    before = worker.loop_stats()
    with worker.client() as client, client.pubsub(ignore_subscribe_messages=True) as published:
        published.psubscribe("celery-task-meta-*")
        with producing(order) as producer:
            ends = _collect(published, {arrival.task_id for arrival in arrivals}, producer.started_at + timeout_s)
            started_at, max_late_s = producer.started_at, producer.max_late_s()
    after = worker.loop_stats()
    done = [arrival for arrival in arrivals if arrival.task_id in ends and ends[arrival.task_id].result is not None]
    spans = [(started_at + arrival.at_s, ends[arrival.task_id].at) for arrival in done]
    latencies = [end - start for start, end in spans]
    last_arrival = started_at + arrivals[-1].at_s
    backlog = len(arrivals) - sum(end.at <= last_arrival for end in ends.values())
    unfinished = len(arrivals) - len(ends)
    slot_s, steps = _ours(before, after) if before else _peers(done, ends)
    p50, p95, p99 = (float(value) for value in np.percentile(latencies or [timeout_s], (50, 95, 99)))
    return Run(
        system=worker.system.name,
        mix=mix,
        load=load,
        repeat=repeat,
        rate=rate,
        jobs=len(arrivals),
        failed=len(ends) - len(done),
        unfinished=unfinished,
        backlog=backlog,
        kept_up=not unfinished and (rate is None or backlog <= max(FULL_BUCKETS, len(arrivals) / 3)),
        throughput=len(done) / (max((end for _, end in spans), default=inf) - started_at - arrivals[0].at_s),
        sustained=_sustained([end for _, end in spans]),
        mean_s=float(np.mean(latencies or [timeout_s])),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        occupancy=slot_s / (DEVICES * max(_covered_s(spans), 1e-3)),
        waste=1 - sum(arrival.num_inference_steps for arrival in done) / max(steps, 1),
        max_late_s=max_late_s,
        latencies_s=[round(latency, 4) for latency in latencies],
    )


def _collect(published: Any, task_ids: set[str], deadline: float) -> dict[str, End]:
    """Wait for the jobs' results, or for the end of the time; STARTED and PROGRESS are not ends."""
    ends: dict[str, End] = {}
    while len(ends) < len(task_ids) and time.time() < deadline:
        message = published.get_message(timeout=0.5)
        now = time.time()
        if message is None:
            continue
        meta = json.loads(message["data"])
        if meta["task_id"] not in task_ids:
            continue
        if meta["status"] == "SUCCESS":
            ends[meta["task_id"]] = End(now, meta["result"])
        elif meta["status"] in ("FAILURE", "REVOKED"):
            print(f"job {meta['task_id']} ended as {meta['status']}: {meta['result']}", flush=True)
            ends[meta["task_id"]] = End(now, None)
    return ends


def _ours(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float]:
    """Return the slot seconds in use and the steps computed, from the device loop's counters."""
    return after["occupied_slot_s"] - before["occupied_slot_s"], after["steps"] - before["steps"]


def _peers(done: Iterable[Arrival], ends: Mapping[str, End]) -> tuple[float, float]:
    """Return the same from the results: each has the batch that its job was in."""
    slot_s = steps = 0.0
    for arrival in done:
        result = ends[arrival.task_id].result
        batch = result["batch"] if result else {}
        slot_s += batch["device_s"]
        steps += arrival.num_inference_steps * batch["rows"] / batch["occupied"]
    return slot_s, steps


def _sustained(ends: Iterable[float]) -> float:
    """Return the images per second in the middle two thirds of their ends."""
    ordered = sorted(ends) or [0.0]
    sixth = len(ordered) // 6
    first, last = max(0, sixth - 1), len(ordered) - sixth - 1
    return (last - first) / max(ordered[last] - ordered[first], 1e-3)


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Return the seconds that at least one span covers."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
