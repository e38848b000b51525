"""Figures in the text format of Prometheus, or in OpenMetrics where the client asks for that.

The only module that needs `prometheus_client`: it comes with the extras `worker`, `http` and `metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder

from sdtpu_worker.operations.figures import Figures, Observed, Readings
from sdtpu_worker.operations.metric_table import METRICS, Kind, Metric, Source


def expose_worker(figures: Figures, accept: str = "") -> tuple[str, bytes]:
    """Return a worker's figures.

    Args:
        figures: the worker's.
        accept: the header `Accept` of the request.

    Returns:
        `(content type, text)`.
    """
    values = figures.read()  # before the histograms: a job's end is counted after its times (`job_record.count_end`)
    histograms = {name: histogram.read() for name, histogram in figures.histograms.items()}
    wanted = (metric for metric in METRICS.values() if metric.source is not Source.QUEUES)
    return _encode(wanted, values, histograms, accept, of_this_process=True)


def expose_queues(values: Readings, accept: str = "") -> tuple[str, bytes]:
    """Return what Redis has, for `sdtpu metrics` and the door; arguments and result as of `expose_worker`."""
    return _encode((m for m in METRICS.values() if m.source is not Source.WORKER), values, {}, accept)


def _encode(
    metrics: Iterable[Metric],
    values: Readings,
    histograms: Mapping[str, Observed],
    accept: str,
    of_this_process: bool = False,
) -> tuple[str, bytes]:
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector([_family(m, values, histograms) for m in metrics]))
    if of_this_process:
        ProcessCollector(registry=registry)
    return content_type, encode(registry)


class _Collector:
    """What a registry collects from: families that are made already."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        yield from self._families

    def describe(self) -> Iterable[Any]:
        """Return nothing: the registry need not look for two of the same name."""
        return ()


def _family(metric: Metric, values: Readings, histograms: Mapping[str, Observed]) -> Any:
    """Return a figure with its values now; none where there are none."""
    text = f"{metric.help}."
    if metric.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(metric.name, text)
        if (seen := histograms.get(metric.name)) is not None:
            bounds = [*(f"{bound:g}" for bound in metric.buckets), "+Inf"]
            histogram.add_metric([], list(zip(bounds, accumulate(seen.counts), strict=True)), seen.total)
        return histogram
    make: Any = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = make(metric.name, text, labels=metric.labels)
    value = values.get(metric.name, {})
    for labels, number in sorted(value.items()) if isinstance(value, Mapping) else [((), value)]:
        family.add_metric(labels, number)
    return family
