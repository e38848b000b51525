"""Several servers in `broker_url`: a worker that goes over to the next one takes everything there."""

from __future__ import annotations

import contextlib

import pytest

from sdtpu_worker.testing.processes import wait_for_line
from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {"SDTPU_LEASE_S": "3", "SDTPU_FAKE_STEP_MS": "5"}


def test_after_a_failover_jobs_are_claimed_renewed_and_acknowledged_on_the_same_server(tmp_path):
    with (
        RedisServer() as first,
        RedisServer() as second,
        Fleet(f"{first.url};{second.url}", tmp_path, CELERY_RESULT_BACKEND=second.url, **SETTINGS) as fleet,
        contextlib.closing(second.client()) as client,
        client_app(second.url),
    ):
        worker = fleet.start("worker")
        first.kill()
        wait_for_line(worker.process, worker.log, f"Connected to redis://:**@127.0.0.1:{second.port}", 60)
        first.start()
        ledger = Ledger()
        ledger.add(1, 10)
        ledger.wait(60)
        wait_until_no_key_is_left(client)
        slow = ledger.add(2, 1000)  # longer than its lease
        ledger.wait(60)
        assert ledger.wrong_pictures() == []
        wait_until_no_key_is_left(client)
        assert "messages redelivered" not in worker.text()
        assert slow in ledger.results
