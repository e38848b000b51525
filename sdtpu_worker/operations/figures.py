"""The counters and histograms of this process, as plain numbers: cheap to add to, and of no library.

What a part of the worker counts anyway (`LoopStats`, the held messages) is not counted a second time: a source is asked
for it when somebody wants to know.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sdtpu_worker.operations.metric_table import METRICS, OUTCOMES, REUSES, Kind

Readings = Mapping[str, float | Mapping[tuple[str, ...], float]]
"""Values by the name of a figure; of one with labels, by the values of these in the order of the table."""

MOST_SERIES = 100
"""How many combinations of labels a counter may have; what comes beyond is counted under `other`."""


class Observed(NamedTuple):
    """What a histogram has seen: how many values in each bucket, the last one without an upper bound, and their sum."""

    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values by size. Any thread.

    Args:
        bounds: upper bounds of the buckets, in rising order.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._lock = bounds, threading.Lock()
        self._counts, self._total = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        index = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[index] += 1
            self._total += value

    def read(self) -> Observed:
        """Return what it has seen."""
        with self._lock:
            return Observed(tuple(self._counts), self._total)


class Figures:
    """What `metric_table` lists of a worker. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        ends: Counter[tuple[str, ...]] = Counter(
            {(name, reason): 0 for name, outcome in OUTCOMES.items() for reason in outcome.known}
        )
        reuses: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in REUSES})
        self._counts: dict[str, Counter[tuple[str, ...]]] = {"sdtpu_requests_total": ends, "sdtpu_reuse_total": reuses}
        self._sources: list[Callable[[], Readings]] = []
        self.histograms = {m.name: Histogram(m.buckets) for m in METRICS.values() if m.kind is Kind.HISTOGRAM}

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a counter.

        Args:
            name: of the counter.
            labels: the values of its labels, in the order of the table.
            by: how much.
        """
        with self._lock:
            counts = self._counts.setdefault(name, Counter())
            if labels not in counts and len(counts) >= MOST_SERIES:
                labels = (*labels[:-1], "other")
            counts[labels] += by

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self.histograms[name].observe(value)

    def read_from(self, source: Callable[[], Readings]) -> None:
        """Ask for values whenever somebody wants to know; where two sources have the same figure, the later one wins.

        Args:
            source: returns at once, in any thread.
        """
        self._sources.append(source)

    def read(self) -> Readings:
        """Return the values of all counters and gauges that have one now."""
        with self._lock:
            values: dict[str, float | Mapping[tuple[str, ...], float]] = {
                name: dict(counts) for name, counts in self._counts.items()
            }
        for source in self._sources:
            values.update(source())
        return values
