"""Redis' master dies and its replica takes over: workers follow, and leases work there.

    pytest -s tests/chaos/test_sentinel.py -n 0

A real cluster of two servers and three sentinels, with passwords for both.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from sdtpu_worker import generate
from sdtpu_worker.errors import BrokerUnavailable
from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.sentinel import SentinelCluster
from tests.support.clients import client_app
from tests.support.waiting import wait_until

LEASE_S = 4
PASSWORD, SENTINEL_PASSWORD = "correct-horse", "battery-staple"


def test_workers_follow_a_failover_and_leases_work_after_it(tmp_path: Path, long: bool):
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(SentinelCluster(PASSWORD, SENTINEL_PASSWORD))
        options = {"socket_timeout": 5, **cluster.transport_options}
        conf: dict[str, Any] = {"broker_transport_options": options, "result_backend_transport_options": options}
        stack.enter_context(client_app(cluster.broker_url, **conf))
        client = stack.enter_context(contextlib.closing(cluster.client()))
        fleet = stack.enter_context(
            Fleet(
                cluster.broker_url,
                tmp_path,
                SDTPU_CPU_DEVICES="2",
                SDTPU_FAKE_STEP_MS="20",
                SDTPU_LEASE_S=str(LEASE_S),
                SDTPU_FAKE_CONF=json.dumps(conf),
            )
        )
        first, ledger = fleet.start("first"), Ledger()
        before = [ledger.add(seed, 30) for seed in range(40 if long else 8)]
        wait_until(lambda: client.hlen("sdtpu:unacked") >= 4, "jobs to be taken")

        killed_at = time.monotonic()
        cluster.kill_master()
        during, refused = [], []
        while time.monotonic() < killed_at + 60:
            try:
                during.append(ledger.add(len(during), 10))
                break
            except BrokerUnavailable as exc:
                refused.append(str(exc))
        accepts_s = time.monotonic() - killed_at
        wait_until(lambda: ledger.collect() >= 0 and during[0] in ledger.results, "a new job", 120)
        consumes_s = time.monotonic() - killed_at
        ledger.wait(90)
        assert not ledger.errors
        assert not ledger.wrong_pictures()

        doomed = [ledger.add(seed, 1000) for seed in range(4)]
        wait_until(lambda: client.hlen("sdtpu:unacked") == 4, "the long jobs to be taken")
        first.kill()
        dead_at = time.monotonic()
        second = fleet.launch("second", SDTPU_FAKE_STEP_MS="2")
        ledger.wait(90)
        wait_until_no_key_is_left(client)
        taken_over_s = time.monotonic() - dead_at
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        assert second.stop() == 0
        assert "messages redelivered: " in second.text()
        print(
            f"\nfailover: {len(before)} jobs before it, 0 lost; {len(refused)} attempts to enqueue refused, the first"
            f" accepted {accepts_s:.1f} s after the master's death, done after {consumes_s:.1f} s; then a worker was"
            f" killed with {len(doomed)} jobs: done by another one {taken_over_s:.1f} s later"
        )
        assert consumes_s < 60
        shown = [worker.text() for worker in fleet.workers] + refused + [repr(generate.app), repr(generate.backend)]
        assert not any(secret in text for text in shown for secret in (PASSWORD, SENTINEL_PASSWORD))
