"""The figures of a worker with the real engine on simulated devices: its phases, its programs, its memory."""

from __future__ import annotations

import pytest

from sdtpu_worker import generate
from tests.observe.scraping import Page, address_of, get
from tests.support.waiting import wait_until
from tests.worker.workers import start_worker


@pytest.mark.timeout(240)
def test_a_worker_with_the_real_engine_shows_its_start_and_its_work(redis_url, app, tmp_path):
    settings = {"SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_CPU_DEVICES": "2", "SDTPU_PROGRESS_S": "0"}
    with start_worker(redis_url, tmp_path, **settings) as (_, log):
        url = f"{address_of(log)}/metrics"
        generate.apply_async(("a red circle",), {"seed": 1, "num_inference_steps": 4}).get(timeout=60)
        wait_until(lambda: Page(get(url)[1]).value("sdtpu_requests_total", outcome="succeeded", reason="") == 1)
        page = Page(get(url)[1])
        phases = {phase for (phase,) in page.by_label("sdtpu_start_seconds")}
        assert phases == {"settings", "broker", "store", "import", "devices", "checkpoint", "programs", "connection"}
        assert page.value("sdtpu_start_seconds", phase="programs") > 0
        programs = page.by_label("sdtpu_programs")
        assert sum(programs.values()) > 0
        assert page.value("sdtpu_programs_after_ready_total") == 0
        assert page.value("sdtpu_device_busy_seconds_total", device="0") > 0
        for part in ("tick", "insert", "step", "decode"):
            assert page.value(f"sdtpu_{part}_seconds_sum") > 0
        assert page.by_label("sdtpu_device_memory_bytes") == {}  # a CPU does not tell
        assert "cpu" in {platform for _, _, _, platform, _ in page.by_label("sdtpu_worker_info")}
