"""The tables of docs/reference/metrics.md, from the table that the code exports; `hooks.py` puts them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdtpu_worker.operations.metric_table import DEVICES, JOBS, OUTCOMES, QUEUES, REUSES, WORKER, Kind, Metric


def of_jobs() -> str:
    """Return the figures of jobs in a worker."""
    return _of_metrics(JOBS)


def of_devices() -> str:
    """Return the figures of the devices and the batch."""
    return _of_metrics(DEVICES)


def of_the_worker() -> str:
    """Return the figures of the worker's process, its start and its leases."""
    return _of_metrics(WORKER)


def of_queues() -> str:
    """Return the figures of what Redis has, with who exports them."""
    rows = ((*_row(metric), metric.source.value.partition(",")[0]) for metric in QUEUES)
    return _table(("name", "type", "labels", "unit", "meaning", "exported by"), rows)


def outcomes() -> str:
    """Return what the labels of `sdtpu_requests_total` say."""
    rows = ((f"`{name}`", each.kind, each.meaning, each.reason or "empty") for name, each in OUTCOMES.items())
    return _table(("`outcome`", "end or passing", "meaning", "`reason`"), rows)


def reuses() -> str:
    """Return what the label of `sdtpu_reuse_total` says."""
    return _table(("`outcome`", "what is said of the image"), ((f"`{name}`", text) for name, text in REUSES.items()))


def _of_metrics(metrics: Iterable[Metric]) -> str:
    return _table(("name", "type", "labels", "unit", "meaning"), map(_row, metrics))


def _row(metric: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    unit = metric.unit
    if metric.kind is Kind.HISTOGRAM:
        unit += f", {len(metric.buckets)} buckets to {metric.buckets[-1]:g}"
    return f"`{metric.name}`", metric.kind.value, labels, unit, metric.help


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
