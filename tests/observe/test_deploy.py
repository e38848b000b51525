"""The shipped rules and the shipped dashboard: they name figures that exist, and a real Prometheus answers them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from sdtpu_worker import generate
from sdtpu_worker.operations.metric_table import METRICS, Kind
from sdtpu_worker.testing.processes import running, wait_for_line, worker_env
from tests.chaos.fleet import Fleet
from tests.observe.prometheus import (
    GRAFANA,
    PROMETHEUS,
    Prometheus,
    alerts,
    find_program,
    queries_of_the_dashboard,
    running_prometheus,
)
from tests.observe.scraping import address_of
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

WITHOUT_VALUES_HERE = {"sdtpu_dead_letters_total", 'kind="limit"'}  # no message was bad; this Redis has no limit
ALERTS_PAGE = (ROOT / "docs" / "how-to" / "alerts.md").read_text()

pytestmark = pytest.mark.timeout(240)


def names_in(query: str) -> set[str]:
    """Return the figures that a query names, without the suffixes of histograms."""
    found = set(re.findall(r"\bsdtpu_[a-z0-9_]+", query))
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in METRICS else name for name in found}


ALL_QUERIES = [*queries_of_the_dashboard(), *((alert["alert"], alert["expr"]) for alert in alerts())]


@pytest.mark.parametrize(("place", "query"), ALL_QUERIES, ids=lambda text: text[:40])
def test_a_query_names_figures_and_labels_that_exist(place, query):
    assert names_in(query) <= set(METRICS)
    for name, labels in re.findall(r"(sdtpu_[a-z0-9_]+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)=~?\"", labels)) <= set(METRICS[name].labels)
    for name in names_in(query):
        asks_for_change = re.search(rf"(rate|increase)\({name}(_bucket|_sum|_count)?[\[{{]", query) is not None
        if METRICS[name].kind is not Kind.COUNTER:
            assert asks_for_change == (METRICS[name].kind is Kind.HISTOGRAM)


def test_every_figure_of_a_worker_is_on_the_dashboard_or_in_an_alert():
    shown = {name for _, query in ALL_QUERIES for name in names_in(query)}
    hosts = {name for name in METRICS if name.startswith("sdtpu_host_")}  # of each host, for tables of one's own
    of_other_panels = {"sdtpu_devices", "sdtpu_ticks_total", "sdtpu_programs", "sdtpu_tick_occupancy_ratio"}
    assert set(METRICS) - shown - hosts - of_other_panels == set()


def test_every_alert_has_its_section_on_the_page_and_no_other_has_one():
    sections = re.findall(r"^### (Sdtpu\w+)$", ALERTS_PAGE, flags=re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"how-to/alerts/#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_the_runbook_names_every_alert_and_leads_to_its_section():
    runbook = (ROOT / "docs" / "how-to" / "runbook.md").read_text()
    links = set(re.findall(r"\[(Sdtpu\w+)\]\(alerts\.md#(\w+)\)", runbook))
    assert links == {(alert["alert"], alert["alert"].lower()) for alert in alerts()}


def test_every_alert_has_a_unit_test_that_fires_it_and_one_that_does_not():
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    for alert in alerts():
        assert (alert["alert"], True) in cases
        assert (alert["alert"], False) in cases


def test_the_unit_tests_of_the_rules_pass():
    for arguments in (["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"],
                      ["test", "rules", "rules_test.yml"]):  # fmt: skip
        command = [find_program("promtool"), *arguments]
        done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_numbers_of_their_own():
    panels = json.loads((GRAFANA / "sdtpu-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


@pytest.mark.parametrize(("more", "lost"), [({}, []), ({"heigth": 4}, ["/panels/1/heigth"])])
def test_grafanas_own_types_read_every_field_of_the_dashboard(more, lost):
    register_default_plugins()
    dashboard = json.loads((GRAFANA / "sdtpu-dashboard.json").read_text())
    dashboard["panels"][1] |= more
    read = Dashboard.from_json(copy.deepcopy(dashboard))
    assert list(fields_lost(dashboard, json.loads(JSONEncoder().encode(read)))) == lost


def fields_lost(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """Yield the places of what is missing or another in what was read; defaults may be added."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            yield from fields_lost(value, read[name], f"{place}/{name}") if name in read else [f"{place}/{name}"]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, pair in enumerate(zip(given, read, strict=True)):
            yield from fields_lost(*pair, f"{place}/{number}")
    elif given != read:
        yield place


@pytest.fixture(scope="module")
def scraped(redis_url, tmp_path_factory) -> Iterator[Prometheus]:
    """Give a Prometheus that has scraped a worker and the queues while jobs ended, ran and waited."""
    find_program("prometheus")
    folder = tmp_path_factory.mktemp("scraped")
    redis.Redis.from_url(redis_url).flushdb()
    listen = "from sdtpu_worker.cli import sdtpu; sdtpu()"
    command = [sys.executable, "-c", listen, "metrics", "-A", "sdtpu_worker.app", "--listen", "127.0.0.1:0"]
    address, log = "127.0.0.1:0", folder / "queues.log"
    with (
        running(command, log, env=worker_env(redis_url)) as process,
        Fleet(redis_url, folder, SDTPU_CPU_DEVICES="2", SDTPU_FAKE_STEP_MS="5", SDTPU_HEALTH_ADDRESS=address) as fleet,
    ):
        queues = re.search(r"http://([\d.:]+)/", wait_for_line(process, log, "metrics: ", 60))[1]
        worker = address_of(fleet.start("a").log).removeprefix("http://")
        with running_prometheus(folder / "prometheus", {"workers": [worker], "queues": [queues]}) as prometheus:
            yield prometheus


def test_a_real_prometheus_answers_every_query_from_a_real_worker(scraped, app):
    for seed in range(60):  # some end, two run and the others wait
        prompt = "raise" if seed == 3 else "x"
        generate.apply_async((prompt,), {"seed": seed, "num_inference_steps": 60 if seed < 8 else 1000})
    wait_until(
        lambda: scraped.query('sdtpu_requests_total{outcome="succeeded"} > 5')
        and scraped.query("sdtpu_oldest_request_seconds > 0"),
        "jobs to end and to wait",
    )  # fmt: skip

    def unanswered() -> list[tuple[str, str]]:
        return [
            (place, query) for place, query in ALL_QUERIES[: len(queries_of_the_dashboard())]
            if not scraped.query(query.replace("$__rate_interval", "20s"))
            and not any(part in query for part in WITHOUT_VALUES_HERE)
        ]  # fmt: skip

    wait_until(lambda: not unanswered(), unanswered)
    for alert in alerts():
        scraped.query(alert["expr"])


def test_the_load_of_the_autoscaler_counts_jobs_that_wait_and_jobs_that_run(scraped, app, redis_url):
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    (query,) = re.findall(r"^sum\(max by .*$", page, flags=re.MULTILINE)
    for seed in range(8):
        generate.apply_async(("x",), {"seed": seed, "num_inference_steps": 1000}, priority=seed)
    with redis.Redis.from_url(redis_url) as client:

        def load() -> int:
            lists = [key for key in client.scan_iter("sdtpu*") if client.type(key) == b"list"]
            return sum(map(client.llen, lists)) + client.zcard("sdtpu:unacked_index")

        assert load() >= 8
        wait_until(lambda: [float(each["value"][1]) for each in scraped.query(query)] == [load()])
