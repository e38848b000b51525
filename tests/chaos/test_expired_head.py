"""An expired job at the head of the queue while the result backend is away: what stands behind it is consumed."""

from __future__ import annotations

import contextlib

import pytest

from sdtpu_worker.testing.processes import private_redis
from tests.chaos.fleet import Fleet
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "1"}


def test_an_expired_job_keeps_nothing_waiting_while_the_result_backend_is_away(tmp_path):
    with (
        private_redis() as broker,
        RedisServer() as results,
        contextlib.closing(results.client()) as client,
        Fleet(broker, tmp_path, CELERY_RESULT_BACKEND=results.url, **SETTINGS) as fleet,
        client_app(broker) as app,
    ):
        worker = fleet.start("worker")
        results.kill()
        expired = app.send_task("sdtpu.generate", ["x"], queue="sdtpu", expires=-1)
        others = [app.send_task("sdtpu.generate", ["x"], {"seed": seed}, queue="sdtpu") for seed in range(2)]
        wait_until(lambda: all(f"[{job.id}] received" in worker.text() for job in others), "the jobs behind")
        assert "Connection to broker lost" not in worker.text()
        results.start()
        for job, end in ((expired, b"REVOKED"), (others[0], b"SUCCESS"), (others[1], b"SUCCESS")):
            key = f"celery-task-meta-{job.id}"
            wait_until(lambda key=key, end=end: end in (client.get(key) or b""), f"{end!r}")
