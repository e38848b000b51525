"""Workers that stand still together (SIGSTOP, as a suspended machine does) find their jobs as they left them.

python -m pytest tests/chaos/test_pauses.py -n 0 -s
"""

from __future__ import annotations

import contextlib
import re
import signal
import time

import pytest

from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow]

LEASE_S = 4.0
SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "2",
    "SDTPU_FAKE_STEP_MS": "40",
    "SDTPU_LEASE_S": str(LEASE_S),
}


def test_the_first_worker_to_wake_takes_no_job_from_those_that_slept_as_long(tmp_path):
    ledger = Ledger()
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        for name in ("a", "b"):
            fleet.launch(name)
        wait_until(lambda: all(" ready." in worker.text() for worker in fleet.workers), "the workers", 120)
        time.sleep(1.3 * LEASE_S)  # each worker has known Redis for a lease: it may sweep
        for seed in range(24):
            ledger.add(seed, 50)
        wait_until(lambda: all("] received" in worker.text() for worker in fleet.workers), "both to have jobs")
        for worker in fleet.workers:
            worker.send(signal.SIGSTOP)
        time.sleep(1.5 * LEASE_S)
        for worker in fleet.workers:
            worker.send(signal.SIGCONT)
            time.sleep(0.3 * LEASE_S)
        ledger.wait(90)
        wait_until_no_key_is_left(client)
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        back = [line for worker in fleet.workers for line in re.findall(r".*messages redelivered: .*", worker.text())]
        assert back == []
        assert all("stood still" in worker.text() for worker in fleet.workers)
