"""`/metrics` of real worker processes while their jobs succeed, fail, expire, are revoked and are handed over."""

from __future__ import annotations

import time

import pytest

from tests.chaos.fleet import Fleet, Ledger
from tests.observe.scraping import scrape

ANY_PORT = {"SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_CPU_DEVICES": "2"}

pytestmark = pytest.mark.timeout(120)


def test_the_figures_of_jobs_that_succeed_are_true(app, redis_url, tmp_path):
    with Fleet(redis_url, tmp_path, **ANY_PORT) as fleet:
        worker, ledger = fleet.start("a"), Ledger()
        for seed in range(10):
            ledger.add(seed, 20)
        ledger.wait(30)
        time.sleep(0.1)
        page = scrape(worker)
        assert page.value("sdtpu_requests_total", outcome="succeeded", reason="") == 10
        assert page.value("sdtpu_images_total") == 10
        assert page.value("sdtpu_steps_total") == 200
