"""An incident, played: a hung device, a worker that is killed, a full Redis. The alerts fire that the page names.

The rules are the shipped ones; only their times are shorter, in the same proportions: a minute becomes a second.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import yaml

from sdtpu_worker import generate
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_env
from tests.chaos.fleet import Fleet
from tests.observe.prometheus import RULES, Prometheus, find_program, running_prometheus
from tests.observe.scraping import address_of
from tests.support.clients import client_app
from tests.support.waiting import wait_until

MINUTE_S = 1.0
SETTINGS = {
    "SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_CPU_DEVICES": "2", "SDTPU_FAKE_STEP_MS": "5", "SDTPU_LEASE_S": "2",
    "SDTPU_STALL_S": "1",
}  # fmt: skip

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def hurried_rules() -> dict[str, Any]:
    """Return the shipped rules with their minutes as seconds; ranges are at least ten scrapes long."""

    def shorter(match: re.Match[str]) -> str:
        return f"[{max(5, round(int(match[1]) * MINUTE_S))}s]"

    rules = copy.deepcopy(yaml.safe_load(RULES.read_text()))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+)m\]", shorter, rule["expr"])
            if waits := re.fullmatch(r"(\d+)m", rule.get("for", "")):
                rule["for"] = f"{round(int(waits[1]) * MINUTE_S)}s"
            elif "for" in rule:
                rule["for"] = "0s"
            rule["expr"] = rule["expr"].replace("sdtpu_tick_late_seconds > 20", "sdtpu_tick_late_seconds > 0.5")
    return rules


@contextlib.contextmanager
def watched(fleet: Fleet, redis_url: str, names: list[str], **settings: str) -> Iterator[Prometheus]:
    """Start workers and `sdtpu metrics`, and a Prometheus that scrapes them and evaluates the rules."""
    find_program("prometheus")
    code, log = "from sdtpu_worker.cli import sdtpu; sdtpu()", fleet.folder / "queues.log"
    command = [sys.executable, "-c", code, "metrics", "-A", "sdtpu_worker.app", "--listen", "127.0.0.1:0"]
    with running(command, log, env=worker_env(redis_url)) as process:
        queues = re.search(r"http://([\d.:]+)/", wait_for_line(process, log, "metrics: ", 60))[1]
        workers = [address_of(fleet.start(name, **settings).log).removeprefix("http://") for name in names]
        jobs = {"sdtpu-workers": workers, "sdtpu-queues": [queues]}
        with running_prometheus(fleet.folder / "prometheus", jobs, hurried_rules()) as prometheus:
            wait_until(lambda: len(prometheus.query("sdtpu_worker_ready == 1")) == len(names), "all to be scraped")
            yield prometheus


def wait_for(prometheus: Prometheus, *alerts: str) -> None:
    """Wait until all of these alerts have fired."""
    seen: set[str] = set()

    def have_fired() -> bool:
        seen.update(prometheus.firing())
        return seen >= set(alerts)

    wait_until(have_fired, lambda: f"{set(alerts) - seen}; these fired: {seen}", 90)


def test_a_quiet_worker_raises_no_alarm(tmp_path):
    with private_redis() as url, client_app(url), Fleet(url, tmp_path, **SETTINGS) as fleet:
        with watched(fleet, url, ["a"]) as prometheus:
            job = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 300})
            job.get(timeout=60)
            wait_until(lambda: prometheus.query("sdtpu_images_total == 1"), "the image to be counted")
            wait_until(lambda: prometheus.firing() == set(), prometheus.firing)  # of a machine that stood still, too


def test_a_hung_device_and_the_worker_that_is_killed_for_it(tmp_path):
    """The leases are not renewed, the other worker gets the job and hangs as well; then nobody consumes."""
    with private_redis() as url, client_app(url), Fleet(url, tmp_path, **SETTINGS) as fleet:
        with watched(fleet, url, ["a", "b"]) as prometheus:
            generate.apply_async(("hang",), {"seed": 1, "num_inference_steps": 50})
            wait_for(prometheus, "SdtpuDeviceHangs", "SdtpuLeasesNotRenewed")
            wait_until(lambda: prometheus.query("sdtpu_worker_live == 0"))  # what the panel "Live and ready" shows
            hung = [worker for worker in fleet.workers if "make no progress" in worker.text()]
            for worker in hung:
                worker.kill()
            wait_until(lambda: all(w in hung or "redelivered" in w.text() for w in fleet.workers), "a sweep")
            for worker in fleet.workers:
                if worker.is_running:
                    worker.kill()
            with redis.Redis.from_url(url) as client:
                client.delete("sdtpu:load:sdtpu")  # which would expire by itself
            generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 5})
            wait_for(prometheus, "SdtpuNoWorkerConsumes")
            wait_until(lambda: prometheus.query("max(sdtpu_workers) == 0"))


def test_a_worker_that_dies_with_jobs_in_hand(tmp_path):
    with private_redis() as url, client_app(url), Fleet(url, tmp_path, **SETTINGS) as fleet:
        first = fleet.start("first", SDTPU_FAKE_STEP_MS="100")  # still busy when the others have started
        for seed in range(4):
            generate.apply_async(("x",), {"seed": seed, "num_inference_steps": 900})
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: client.zcard("sdtpu:unacked_index") == 4, "all jobs to be taken")
        with watched(fleet, url, ["second"]) as prometheus:
            first.kill()
            wait_for(prometheus, "SdtpuWorkersDie")
            died = 'sdtpu_requests_total{outcome="redelivered", reason="died"} > 0'
            wait_until(lambda: prometheus.query(died), "the worker's own figure")


def test_a_redis_that_fills_up(tmp_path):
    with private_redis("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as url, client_app(url):
        with Fleet(url, tmp_path, **SETTINGS) as fleet, watched(fleet, url, ["a"]) as prometheus:
            with redis.Redis.from_url(url) as client:
                for number in range(1000):
                    if client.info("memory")["used_memory"] > 0.9 * 8 * 2**20:
                        break
                    client.set(f"other:{number}", b"x" * 100_000)
            wait_for(prometheus, "SdtpuRedisMemory")
            figures = [f'sdtpu_redis_memory_bytes{{kind="{kind}"}}' for kind in ("used", "limit")]
            used, limit = (wait_until(lambda figure=figure: prometheus.query(figure), figure) for figure in figures)
            assert float(used[0]["value"][1]) > 0.8 * float(limit[0]["value"][1]) > 0
