"""The door's `/metrics`: the same page as `sdtpu metrics`, for whom it is meant, while no worker runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from sdtpu_worker.contract.load_report import WorkerLoad, publish_load
from sdtpu_worker.operations.metric_table import METRICS, Source
from sdtpu_worker.testing.processes import private_redis, worker_env
from tests.http.doors import RUN_SDTPU, DoorProcess, keys, start_door
from tests.observe.scraping import Page
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

FOX = {"prompt": "a secret fox"}


@pytest.fixture(scope="module")
def quiet_redis() -> Iterator[str]:
    """Run a Redis that no worker uses."""
    with private_redis() as url:
        yield url


@pytest.fixture(scope="module")
def watched(quiet_redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """Run a door with two callers and a scraper."""
    settings = {"SDTPU_HTTP_KEYS": keys(ann="", bob=""), "SDTPU_HTTP_METRICS_KEYS": keys(prom="")}
    with start_door(quiet_redis, tmp_path_factory.mktemp("watched"), **settings) as door:
        yield door


@pytest.fixture(autouse=True)
def redis(quiet_redis: str) -> Iterator[Redis]:
    """Give a client of an empty Redis."""
    with Redis.from_url(quiet_redis) as client:
        client.flushdb()
        yield client


def page_of(door: DoorProcess, key: str = "sk-prom") -> str:
    """Return the door's page, as old as a second at most."""
    with door.client(key) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return answer.text


def fresh_page_of(door: DoorProcess, waiting: int) -> str:
    """Return the door's page when it counts so many jobs that wait."""
    return wait_until(
        lambda: text if sum(Page(text := page_of(door)).by_label("sdtpu_requests_waiting").values()) == waiting else "",
        f"{waiting} jobs to be counted",
    )


def test_the_door_says_the_same_as_the_command_and_nothing_of_whom_the_jobs_are(watched, redis, quiet_redis):
    publish_load(redis, "sdtpu", WorkerLoad("tpu-1", 8, {"8x8": 0.1}, 5.0, {6: 3}, 2.0), ttl_s=600)
    redis.zadd("sdtpu:unacked_index", {"tag": 1e12})
    redis.hset("sdtpu:unacked", "tag", "sdtpu\x06\x166\n{}")
    for name in ("ann", "bob"):
        with watched.client(f"sk-{name}") as client:
            assert client.post("/v1/jobs", json=FOX).status_code == 202
    text = fresh_page_of(watched, 2)
    command = [sys.executable, "-c", RUN_SDTPU, "metrics"]
    printed = subprocess.run(
        command, env=worker_env(quiet_redis), cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )

    def without_times(page: str) -> list[str]:
        names = ("sdtpu_oldest_request_seconds{", "sdtpu_redis_memory_bytes{")
        return [line for line in page.splitlines() if not line.startswith(names)]

    assert without_times(text) == without_times(printed.stdout)
    page = Page(text)
    assert page.value("sdtpu_requests_held", queue="sdtpu") == 1
    assert page.value("sdtpu_host_slots", host="tpu-1") == 8
    assert page.by_label("sdtpu_queue_wait_estimate_seconds")
    assert max(page.by_label("sdtpu_oldest_request_seconds").values()) > 0
    known = {name for name, metric in METRICS.items() if metric.source is not Source.WORKER}
    assert set(re.findall(r"^# TYPE (\w+)", text, flags=re.MULTILINE)) == known
    assert not re.search("secret|fox|ann|bob", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))


def test_the_figures_follow_the_queue_while_no_worker_runs(watched):
    assert Page(fresh_page_of(watched, 0)).value("sdtpu_workers") == 0
    with watched.client("sk-ann") as client:
        for _ in range(3):
            client.post("/v1/jobs", json=FOX)
    fresh_page_of(watched, 3)


@pytest.mark.parametrize(("key", "detail"), [("", "a key is missing"), ("sk-ann", "unknown"), ("sk-eve", "unknown")])
def test_only_the_key_of_a_scraper_opens_the_page(watched, key, detail):
    with watched.client(key) as client:
        answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert detail in answer.json()["detail"]
    assert "sdtpu_requests" not in answer.text


def test_the_key_of_a_scraper_opens_nothing_else(watched):
    with watched.client("sk-prom") as client:
        assert client.get("/v1/jobs").status_code == client.post("/v1/jobs", json=FOX).status_code == 401


def test_openmetrics_is_spoken_to_whom_asks_for_it(watched):
    with watched.client("sk-prom") as client:
        plain = client.get("/metrics")
        other = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert other.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert other.text.endswith("# EOF\n")


def test_many_scrapers_read_redis_once_a_second(watched, redis):
    def looks() -> int:  # two a page: load reports, counts of dead letters
        return redis.info("commandstats").get("cmdstat_hgetall", {"calls": 0})["calls"]

    page_of(watched)
    redis.config_resetstat()
    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(lambda _: page_of(watched), range(64)))
    assert looks() < 64
    wait_until(lambda: page_of(watched) and looks() >= 2, "the page to be read anew")


def test_a_door_with_keys_and_none_for_the_page_gives_it_to_nobody(quiet_redis, tmp_path):
    with start_door(quiet_redis, tmp_path, SDTPU_HTTP_KEYS=keys(ann="")) as door, door.client("sk-ann") as client:
        answer = client.get("/metrics")
    assert (answer.status_code, answer.json()["code"]) == (403, "NoMetricsKey")
    assert "sdtpu_http_metrics_keys" in answer.json()["detail"]


def test_a_door_without_keys_gives_the_page_to_its_own_machine(quiet_redis, tmp_path):
    with start_door(quiet_redis, tmp_path) as door, door.client() as client:
        assert client.get("/metrics").status_code == 200
        answer = client.get("/metrics", headers={"Host": "door.example"})
        assert (answer.status_code, answer.json()["code"]) == (403, "LocalCallersOnly")


def test_an_open_door_may_keep_the_page_for_its_scraper(quiet_redis, tmp_path):
    settings = {"SDTPU_HTTP_OPEN": "on", "SDTPU_HTTP_METRICS_KEYS": keys(prom="")}
    with start_door(quiet_redis, tmp_path, **settings) as door, door.client() as client:
        assert client.get("/v1/jobs").status_code == 200
        assert client.get("/metrics").status_code == 401
        assert Page(page_of(door)).value("sdtpu_workers") == 0


def test_a_redis_that_is_away_is_no_page_of_zeros(tmp_path):
    with private_redis() as url, start_door(url, tmp_path) as door:
        with Redis.from_url(url) as redis, httpx.Client(base_url=door.url, trust_env=False, timeout=30) as client:
            assert client.get("/metrics").status_code == 200
            redis.shutdown(nosave=True)
            answer = wait_until(lambda: found if (found := client.get("/metrics")).status_code != 200 else None)
    assert (answer.status_code, answer.json()["code"]) == (503, "BrokerUnavailable")
    assert "127.0.0.1" not in answer.text
