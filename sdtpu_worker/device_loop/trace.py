"""A timeline of a run in Chrome's trace format: open it in Perfetto (https://ui.perfetto.dev).

One process of the timeline stands for the devices, with a row for each and the phases of every tick; the other stands
for the host, with what its threads did for each job. The start and the end of a tick are measured. Devices do not say
when a phase ends, so the parts of a tick are drawn in proportion to what they are expected to cost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.aggregator.plan import Lane, Phase, Plan

logger = logging.getLogger(__name__)

_DEVICES, _HOST = 1, 2
_MAX_EVENTS = 2_000_000  # about 300 MB


class Trace:
    """Writes the timeline to a file during the run. Any thread may use it.

    When a write fails (a full disk), the trace logs that once and stops: no job fails for a timeline.

    Args:
        path: the file; an older one is replaced.
        costs: what work costs, by lane; it gives each part of a tick its share.
        num_devices: rows for the devices.
    """

    def __init__(self, path: Path, costs: Mapping[Lane, Cost], num_devices: int) -> None:
        self._costs, self._lock, self._threads, self._events = costs, threading.Lock(), dict[int, int](), 0
        self._file: Any = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        names: list[tuple[int, int | None, str]] = [(_DEVICES, None, "devices"), (_HOST, None, "host")]
        names += [(_DEVICES, device, f"device {device}") for device in range(num_devices)]
        for pid, tid, name in names:
            what = "process_name" if tid is None else "thread_name"
            self._write(ph="M", name=what, pid=pid, tid=tid or 0, args={"name": name})

    def tick(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Draw what a tick did on every device, and the slots in use."""
        cost, longest_s = self._costs[plan.lane], max(plan.work_s, default=0.0)
        scale = (ended_at - started_at) / longest_s if longest_s > 0 else 0.0
        for place, name in [*((p, "park") for p in plan.parked), *((p, "resume") for p in plan.resumed)]:
            self._write(ph="i", s="t", name=name, ts=_us(started_at), pid=_DEVICES, tid=place.device,
                        args={"task": place.task_id, "slot": place.slot})  # fmt: skip
        for device, phases in enumerate(plan.devices):
            at = started_at
            for name, seconds, args in (part for phase in phases for part in _parts(phase, cost)):
                span = {"ts": _us(at), "dur": max(1, round(1e6 * seconds * scale))}
                self._write(ph="X", name=name, pid=_DEVICES, tid=device, args=args, **span)
                at += seconds * scale
        occupancy = {"slots in use": plan.occupied, "devices at work": plan.busy}
        self._write(ph="C", name="occupancy", ts=_us(started_at), pid=_DEVICES, tid=0, args=occupancy)

    def transfer(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Draw how the calling thread brought the images of a tick from the devices to the host."""
        tasks = [image.task_id for image in plan.decoded()]
        if tasks:
            self._draw("transfer", started_at, ended_at, {"tasks": tasks})

    @contextlib.contextmanager
    def span(self, name: str, task_id: str) -> Iterator[None]:
        """Draw what the calling thread does for a job in this block."""
        started_at = time.monotonic()
        try:
            yield
        finally:
            self._draw(name, started_at, time.monotonic(), {"task": task_id})

    def close(self) -> None:
        """Finish the file."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                try:
                    with file:
                        file.write("{}]\n")
                except OSError as exc:
                    logger.warning("the end of the trace could not be written: %s", exc)

    def _draw(self, name: str, started_at: float, ended_at: float, args: dict[str, Any]) -> None:
        span = {"ts": _us(started_at), "dur": max(1, _us(ended_at) - _us(started_at))}
        self._write(ph="X", name=name, pid=_HOST, tid=self._thread_number(), args=args, **span)

    def _thread_number(self) -> int:
        ident = threading.get_ident()
        with self._lock:
            return self._threads.setdefault(ident, len(self._threads))

    def _write(self, **event: Any) -> None:
        line = json.dumps(event) + ",\n"
        with self._lock:
            self._events += 1
            if self._file is None or self._events > _MAX_EVENTS:
                return
            try:
                self._file.write(line)
            except OSError as exc:
                file, self._file = self._file, None
                logger.warning("the trace is switched off, because its file cannot be written: %s", exc)
                with contextlib.suppress(OSError):
                    file.close()  # it tries once more to write what is in its buffer
                return
            if self._events == _MAX_EVENTS:
                logger.warning("the trace has %d events: later events are not written", _MAX_EVENTS)


class NoTrace(Trace):
    """Draws nothing."""

    def __init__(self) -> None: ...

    def tick(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Do nothing."""

    def transfer(self, plan: Plan, started_at: float, ended_at: float) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def span(self, name: str, task_id: str) -> Iterator[None]:
        """Do nothing."""
        yield

    def close(self) -> None:
        """Do nothing."""


def _parts(phase: Phase, cost: Cost) -> Iterator[tuple[str, float, dict[str, Any]]]:
    if phase.decode:
        yield "decode", cost.decode_s, {"slot": phase.decode[0], "task": phase.decode[1]}
    if phase.insert:
        yield "insert", cost.insert_s, {"slot": phase.insert[0], "task": phase.insert[1]}
    if phase.steps:
        yield "advance", phase.steps * cost.step_s, {"steps": phase.steps}


def _us(seconds: float) -> int:
    return round(1e6 * seconds)
