"""Reads the figures of a worker as Prometheus does."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Page:
    """What one scrape brought.

    Attributes:
        families: by name without the suffix of its samples.
    """

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Return the value of one sample; 0 where there is none."""
        return self._samples.get((name, tuple(sorted(labels.items()))), 0.0)

    def by_label(self, name: str) -> Mapping[tuple[str, ...], float]:
        """Return the values of all samples of a name, by their labels' values in the order of the labels' names."""
        return {tuple(value for _, value in labels): number for (own, labels), number in self._samples.items()
                if own == name}  # fmt: skip


def address_of(log: Path) -> str:
    """Return where a worker says that it answers."""
    return re.search(r"health: (http://[\d.:]+) ", log.read_text())[1]


def get(url: str, accept: str = "") -> tuple[str, str]:
    """Return the content type and the text of a page."""
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with _NO_PROXY.open(request, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def scrape(worker: Any) -> Page:
    """Return the figures of a `WorkerProcess` now."""
    return Page(get(f"{address_of(worker.log)}/metrics")[1])
