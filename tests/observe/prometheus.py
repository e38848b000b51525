"""A real Prometheus on loopback, where there is one: Debian's package `prometheus` brings it with `promtool`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.error
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtpu_worker.testing.processes import free_port, running
from tests.observe.scraping import get
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
RULES = PROMETHEUS / "rules.yml"


def find_program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`; without it the test is skipped, but for CI, where it fails."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no {name} on the PATH: CI needs Debian's package prometheus")
    if found is None:
        pytest.skip(f"no {name} on the PATH: Debian's package prometheus brings it")
    return found


def alerts() -> list[dict[str, Any]]:
    """Return the alerts of the shipped rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries_of_the_dashboard() -> list[tuple[str, str]]:
    """Return the title of its panel and the text of each query of the shipped dashboard."""
    panels = json.loads((GRAFANA / "sdtpu-dashboard.json").read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, text: str) -> list[dict[str, Any]]:
        """Return the result of an instant query.

        Raises:
            AssertionError: Prometheus refuses the query.
        """
        try:
            _, answer = get(f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': text})}")
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{text}: {exc.read().decode()}") from exc
        result = json.loads(answer)["data"]["result"]
        return result if isinstance(result, list) else [result]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        _, answer = get(f"{self._url}/api/v1/alerts")
        return {alert["labels"]["alertname"] for alert in json.loads(answer)["data"]["alerts"]
                if alert["state"] == "firing"}  # fmt: skip


@contextlib.contextmanager
def running_prometheus(
    folder: Path, jobs: Mapping[str, Sequence[str]], rules: Mapping[str, Any] | None = None, key: str = ""
) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes twice a second.

    Args:
        folder: for its files.
        jobs: the addresses to scrape, by the name of the job.
        rules: the alerts to evaluate; none by default.
        key: what it sends as its bearer key; nothing by default.
    """
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": list(targets)}],
             **({"authorization": {"credentials": key}} if key else {})}
            for name, targets in jobs.items()
        ],
    }  # fmt: skip
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules or {"groups": []}))
    port = free_port()
    command = [
        find_program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with running(command, folder / "prometheus.log") as process:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")

        def answers() -> bool:
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            with contextlib.suppress(OSError):
                return bool(get(f"http://127.0.0.1:{port}/-/ready"))
            return False

        wait_until(answers, "Prometheus to be ready")
        yield prometheus
