"""The figures of a worker with the real engine on simulated devices: while it starts, and at work."""

from __future__ import annotations

import json

import pytest

from sdtpu_worker import generate
from sdtpu_worker.operations.health import START_PHASES
from sdtpu_worker.testing.processes import wait_for_line
from tests.chaos.fleet import Fleet
from tests.observe.scraping import address_of, get, scrape
from tests.support.paths import XLA_CACHE
from tests.support.waiting import wait_until

SETTINGS = {"SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_CPU_DEVICES": "2", "SDTPU_COMPILE_CACHE": XLA_CACHE}


@pytest.mark.timeout(240)
def test_a_worker_with_the_real_engine_shows_its_start_and_its_work(redis_url, app, tmp_path):
    with Fleet(redis_url, tmp_path, app="sdtpu_worker.app", **SETTINGS) as fleet:
        worker = fleet.launch("a")
        wait_for_line(worker.process, worker.log, "health: http", 60)
        page = scrape(worker)
        assert (page.value("sdtpu_worker_live"), page.value("sdtpu_worker_ready")) == (1, 0)
        assert page.value("sdtpu_start_seconds", phase="settings") >= 0
        assert page.by_label("sdtpu_worker_info") == {}

        wait_for_line(worker.process, worker.log, " ready.", 200)
        wait_until(lambda: scrape(worker).value("sdtpu_worker_ready") == 1, "the worker to be ready")
        generate.apply_async(("a red circle",), {"seed": 1, "num_inference_steps": 4}).get(timeout=120)
        wait_until(lambda: scrape(worker).value("sdtpu_requests_total", outcome="succeeded", reason="") == 1)
        page = scrape(worker)
        phases = {phase for (phase,) in page.by_label("sdtpu_start_seconds")}
        assert phases == set(START_PHASES)
        line = wait_for_line(worker.process, worker.log, "taking jobs; started in", 60)
        assert all(f"{phase} " in line for phase in ("process", "import", "programs", "first_run"))
        verdict = json.loads(get(f"{address_of(worker.log)}/readyz")[1])
        assert verdict["checks"]["serving"]["detail"] in line
        assert page.value("sdtpu_start_seconds", phase="programs") > 0
        assert sum(page.by_label("sdtpu_programs").values()) > 0
        assert page.value("sdtpu_programs_after_ready_total") == 0
        assert page.value("sdtpu_device_busy_seconds_total", device="0") > 0
        for part in ("tick", "insert", "step", "decode"):
            assert page.value(f"sdtpu_{part}_seconds_sum") > 0
        assert page.by_label("sdtpu_device_memory_bytes") == {}  # a CPU does not tell
        assert "cpu" in {platform for _, _, _, platform, _ in page.by_label("sdtpu_worker_info")}
