"""Load reports: what workers publish of their capacity, and what a client estimates from them for a new job.

Reports are in Redis, and expire after a few seconds unless the worker publishes a new one.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdtpu_worker.contract.report_text import read_report
from sdtpu_worker.contract.request import DEFAULT_STEPS, MAX_STEPS, GenerationRequest
from sdtpu_worker.contract.served import Served
from sdtpu_worker.redaction import brief

logger = logging.getLogger(__name__)

LOAD_TTL_S = 15.0
"""Seconds after which a load report expires."""
# The bounds of a report. Others may be able to write one; within these bounds no estimate overflows or divides by zero.
MAX_TTL_S = 3600.0
MAX_REPORT_BYTES = 65_536
MAX_HOST_CHARACTERS = 1024
MAX_ENTRIES = 1000
MAX_COUNT = 1_000_000
MIN_JOB_S, MAX_SECONDS = 1e-6, 1e9
_KEY_PREFIX = "sdtpu:load:"
_PRIORITY = re.compile("-?[0-9]{1,7}")


@dataclass(frozen=True)
class WorkerLoad:
    """The load report of one worker.

    Attributes:
        host: the worker's name, unique among the workers of its queue.
        num_slots: how many jobs its devices denoise at the same time.
        step_s: seconds of one denoising step with every slot in use, by size ("512x512", height first); the
            checkpoint's own size comes first.
        mean_job_s: seconds that recent jobs have occupied their slots, on average; before the first job, 50 steps.
        held: how many jobs the worker holds, in a slot or waiting for one, by priority number.
        next_free_s: seconds until the next slot is free; 0 when one is free now.
        default_steps: denoising steps of a job that asks for no number of them.
        serves: what its jobs may ask for; None from a worker that does not say.
    """

    host: str
    num_slots: int
    step_s: Mapping[str, float]
    mean_job_s: float
    held: Mapping[int, int]
    next_free_s: float = 0.0
    default_steps: int = DEFAULT_STEPS
    serves: Served | None = None

    def __post_init__(self) -> None:
        _check_text("host", self.host, MAX_HOST_CHARACTERS)
        _check_number("num_slots", self.num_slots, 1, MAX_COUNT, int)
        _check_number("mean_job_s", self.mean_job_s, MIN_JOB_S, MAX_SECONDS)
        _check_number("next_free_s", self.next_free_s, 0, MAX_SECONDS)
        _check_number("default_steps", self.default_steps, 1, MAX_STEPS, int)
        for name, entries in (("step_s", self.step_s), ("held", self.held)):
            _check_number(f"the number of entries in {name}", len(entries), 0, MAX_ENTRIES)
        for size, seconds in self.step_s.items():
            _check_text("a size in step_s", size, MAX_HOST_CHARACTERS)
            _check_number("seconds in step_s", seconds, 0, MAX_SECONDS)
        for priority, count in self.held.items():
            _check_number("a priority in held", priority, -MAX_COUNT, MAX_COUNT, int)
            _check_number("a count in held", count, 0, MAX_COUNT, int)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerLoad:
        """Return the report in a JSON text; fields that this version does not know are ignored.

        Raises:
            ValueError: the text is not a load report, or a field is out of its bounds. No other exception is raised,
                whatever the text is.
        """
        facts = read_report("a load report", text, MAX_REPORT_BYTES)
        held = facts.get("held")
        if not isinstance(held, dict) or not isinstance(facts.get("step_s"), dict):
            raise ValueError("held and step_s of a load report must be JSON objects")
        if not all(_PRIORITY.fullmatch(priority) for priority in held):
            raise ValueError(f"the names in held must be priority numbers, got {brief(held)}")
        return cls(
            host=facts.get("host", ""),
            num_slots=facts.get("num_slots", 0),
            step_s=facts["step_s"],
            mean_job_s=facts.get("mean_job_s", 0.0),
            held={int(priority): count for priority, count in held.items()},
            next_free_s=facts.get("next_free_s", -1.0),
            default_steps=facts.get("default_steps", DEFAULT_STEPS),
            serves=None if facts.get("serves") is None else Served.from_json(facts["serves"]),
        )

    def starts(self, priority: int, has_deadline: bool) -> tuple[float, float]:
        """Return when the worker would start new jobs of a priority, one after the other.

        A slot of a less urgent job counts as free (`sdtpu_preemption`). Jobs of the same priority that wait in the
        worker start first, unless the new job has a deadline, with which it passes them.

        Args:
            priority: of the new jobs; lower is more urgent.
            has_deadline: whether they expire.

        Returns:
            `(first_s, every_s)`: seconds until the first start, and from one start to the next. With free slots
            `first_s` is negative: each of them makes it less by `every_s`.
        """
        every_s = self.mean_job_s / self.num_slots
        in_slots = sum(count for held, count in self.held.items() if held <= priority)
        if in_slots < self.num_slots:
            return (in_slots - self.num_slots) * every_s, every_s
        ahead = sum(count for held, count in self.held.items() if held < priority) if has_deadline else in_slots
        return self.next_free_s + max(0, ahead - self.num_slots) * every_s, every_s

    def job_s(self, request: GenerationRequest) -> float:
        """Return the seconds that a job with these parameters would occupy its slot."""
        own_size = next(iter(self.step_s.values()), None)
        step_s = self.step_s.get(f"{request.height}x{request.width}", own_size)
        return self.mean_job_s if step_s is None else (request.num_inference_steps or self.default_steps) * step_s


def publish_load(client: Any, queue: str, load: WorkerLoad, prefix: str = "", ttl_s: float = LOAD_TTL_S) -> None:
    """Publish a worker's load report in place of its last one.

    Args:
        client: a client of the broker's Redis.
        queue: `sdtpu_queue`, also when the worker serves the queues of tenants.
        load: the report.
        prefix: kombu's `global_keyprefix`.
        ttl_s: seconds after which the report expires, by Redis' clock: three times the seconds between two reports, so
            that one of them may be lost.
    """
    key = prefix + load_key(queue)
    now_s, reports = client.pipeline(transaction=False).time().hgetall(key).execute()
    dead = [host for host, text in reports.items() if not _is_living_report(text, now_s)]
    pipeline = client.pipeline()
    pipeline.hset(key, load.host, json.dumps({**json.loads(load.to_json()), "until": _seconds(now_s) + ttl_s}))
    if dead:
        pipeline.hdel(key, *dead)
    pipeline.expire(key, math.ceil(ttl_s)).execute()


def withdraw_load(client: Any, queue: str, host: str, prefix: str = "") -> None:
    """Remove the report of a worker that takes no more jobs."""
    client.hdel(prefix + load_key(queue), host)


def read_loads(client: Any, queue: str, prefix: str = "") -> list[WorkerLoad]:
    """Return the reports that have not expired, in the order of the workers' names."""
    now_s, reports = client.pipeline(transaction=False).time().hgetall(prefix + load_key(queue)).execute()
    return living_loads(reports, now_s)


def estimated_start_s(loads: Iterable[WorkerLoad], ahead: int, priority: int, has_deadline: bool) -> float | None:
    """Return the seconds until a new job has a slot; None without a load report.

    Args:
        loads: the load reports of the workers that may take the job.
        ahead: how many messages the workers take before it.
        priority: the job's; lower is more urgent.
        has_deadline: whether the job expires.
    """
    starts = sorted(load.starts(priority, has_deadline) for load in loads)
    jobs_per_s = offset = 0.0
    start_s = None
    for i, (first_s, every_s) in enumerate(starts):
        jobs_per_s += 1 / every_s
        offset += first_s / every_s
        start_s = max(0.0, (ahead + offset) / jobs_per_s)
        if i + 1 < len(starts) and start_s <= starts[i + 1][0]:
            break  # the job starts before the slower workers could start one
    return start_s


def load_key(queue: str) -> str:
    """Return the key of a queue's load reports: a hash of JSON texts by host."""
    return _KEY_PREFIX + queue


def living_loads(reports: Mapping[Any, Any], now_s: Any) -> list[WorkerLoad]:
    """Return the reports that have not expired, in the order of the workers' names.

    Args:
        reports: what HGETALL returned for `load_key`.
        now_s: what TIME returned.
    """
    loads = []
    for text in reports.values():
        try:
            if _is_alive(text, now_s):
                loads.append(WorkerLoad.from_json(text))
        except ValueError as exc:
            logger.warning("a worker's load report is left out: %s", exc)
    return sorted(loads, key=lambda load: load.host)


def _is_alive(text: str | bytes, now_s: Any) -> bool:
    """Return whether a report has not expired.

    Raises:
        ValueError: no worker wrote the report: it does not say when it expires, or expires more than an hour from now.
    """
    until: Any = read_report("a load report", text, MAX_REPORT_BYTES).get("until")
    _check_number("until", until, 0, _seconds(now_s) + MAX_TTL_S)
    return until > _seconds(now_s)


def _is_living_report(text: str | bytes, now_s: Any) -> bool:
    """Return whether a text is a report that has not expired."""
    try:
        return _is_alive(text, now_s)
    except ValueError:
        return False


def _check_number(name: str, value: Any, low: float, high: float, kind: Any = int | float) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:,} to {high:,}, got {brief(value)}")


def _check_text(name: str, value: Any, most: int) -> None:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{name} must be a string of at most {most} characters, got {brief(value)}")


def _seconds(redis_time: tuple[int, int]) -> float:
    seconds, microseconds = redis_time
    return seconds + microseconds / 1e6
