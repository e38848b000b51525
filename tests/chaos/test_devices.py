"""Devices that hang or are lost cost no job anything: another worker does them, and the sick one goes.

    python -m pytest tests/chaos/test_devices.py -n 0 -s

A tick that never ends: `/livez` and `/readyz` turn to 503, another worker takes the jobs over, also the one that the
first hung on, and the sick worker ends within its bounds after SIGTERM. Devices that are lost: the worker exits with
75 and gives its jobs back at once.
"""

from __future__ import annotations

import contextlib
import time

import pytest

from sdtpu_worker.operations.health_http import ask_health
from sdtpu_worker.testing.processes import free_port
from sdtpu_worker.worker.process_ends import EX_ENGINE_LOST
from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "1",
    "SDTPU_SLOTS_PER_DEVICE": "4",
    "SDTPU_LEASE_S": "2",
    "SDTPU_STALL_S": "2",
    "SDTPU_GRACE_S": "2",
    "SDTPU_TICK_S": "0.05",
}
STEPS = 100


@pytest.fixture
def arena(tmp_path):
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        yield fleet, client


def is_well(port: int, path: str) -> bool:
    return ask_health(("127.0.0.1", port), path)[0]


def test_the_jobs_of_a_hung_device_are_done_by_another_worker_and_its_own_ends_in_time(arena):
    fleet, client = arena
    port, ledger = free_port(), Ledger()
    hung = fleet.start("hung", SDTPU_HEALTH_ADDRESS=f"127.0.0.1:{port}")
    wait_until(lambda: is_well(port, "/livez") and is_well(port, "/readyz"), "both to be well")
    began = time.monotonic()
    for seed in range(10):
        ledger.add(seed, STEPS, "hang" if seed == 2 else "x")
    for path in ("/livez", "/readyz"):
        wait_until(lambda path=path: not is_well(port, path), f"{path} to turn")
    turned_s = time.monotonic() - began
    fleet.launch("healthy", SDTPU_FAKE_ACCIDENTS="off")
    ledger.wait(90)
    done_s = time.monotonic() - began
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    began = time.monotonic()
    code = hung.stop(60)
    stopped_s = time.monotonic() - began
    wait_until_no_key_is_left(client)
    assert "the devices make no progress" in hung.text()
    assert stopped_s < 30
    print(
        f"\nhung device: /livez and /readyz are 503 after {turned_s:.1f} s, all 10 jobs done after {done_s:.1f} s;"
        f" on SIGTERM it ends in {stopped_s:.1f} s with code {code}"
    )


def test_a_worker_that_loses_its_devices_exits_with_75_and_the_next_one_does_all_its_jobs(arena):
    fleet, client = arena
    ledger = Ledger()
    lost = fleet.start("lost", SDTPU_LEASE_S="600")  # nobody waits for leases to end
    for seed in range(10):
        ledger.add(seed, STEPS, "lose" if seed == 2 else "x")
    began = time.monotonic()
    assert lost.process.wait(60) == EX_ENGINE_LOST
    ended_s = time.monotonic() - began
    fleet.launch("next", SDTPU_FAKE_ACCIDENTS="off")
    ledger.wait(90)
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    wait_until_no_key_is_left(client)
    print(
        f"\nlost devices: the worker exits with {EX_ENGINE_LOST} after {ended_s:.1f} s, the next one does all 10 jobs"
    )
