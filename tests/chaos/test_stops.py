"""Workers that are told to stop lose nothing and repeat next to nothing: the next one goes on at the same step.

    python -m pytest tests/chaos/test_stops.py -n 0 -s            # part of CI
    python -m pytest tests/chaos/test_stops.py -n 0 -s --long     # SIGTERM every 10 s to a run of some minutes

The rolling run: whoever holds the jobs gets a SIGTERM again and again, with a grace period that is much shorter than
a job, the next worker starting before or after that by turns. Four jobs of five bring a picture, a mask, LoRAs or all
of them. Every worker exits with 0, no job is lost, and at most 2 % of the steps are done twice. A second SIGTERM and
SIGQUIT mean at once, and Celery's soft shutdown is the time that it says.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tests.chaos.fleet import Fleet, Ledger, WorkerProcess, wait_until_no_key_is_left
from tests.chaos.pictures import mixed_parameters
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "2",
    "SDTPU_FAKE_STEP_MS": "20",
    "SDTPU_LEASE_S": "60",  # so that nothing is waited for but what is handed over
    "SDTPU_TICK_S": "0.1",
}
SLOTS, STEPS = 4, 1000


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        client.flushall()
        yield client


@pytest.fixture
def fleet(server: RedisServer, client: Any, tmp_path: Any) -> Iterator[Fleet]:
    with client_app(server.url), Fleet(server.url, tmp_path, **SETTINGS) as fleet:
        yield fleet


def steps_done(fleet: Fleet) -> int:
    return sum(worker.loop_stats()["job_steps"] for worker in fleet.workers)


def wait_for_slots(client: Any, count: int = SLOTS) -> None:
    """Wait until so many jobs have slots, by default in all that there are, and some time more."""
    wait_until(lambda: len(client.keys("sdtpu:starts:*")) >= count, "jobs to have slots")
    time.sleep(1.5)


def test_rolling_stops_lose_no_job_and_repeat_next_to_no_step(fleet, client, long):
    jobs, steps, rounds, period_s, grace_s = (100, 50, 0, 10.0, 2.0) if long else (24, 60, 3, 1.0, 1.0)
    random, ledger, began = Random(50), Ledger(mixed=mixed_parameters), time.monotonic()
    settings = {"SDTPU_GRACE_S": str(grace_s), "SDTPU_FAKE_STEP_MS": "80" if long else "40"}
    holder = fleet.start("0", **settings)
    for seed in range(jobs):
        ledger.add(seed, steps)
    stopped = 0
    while stopped < rounds or (long and ledger.collect()):
        for _ in range(2 * SLOTS - ledger.collect() if not long else 0):  # on a busy machine, workers start slowly
            ledger.add(len(ledger.jobs), steps)
        time.sleep(period_s * random.uniform(0.8, 1.2))
        number = str(stopped + 1)
        if overlaps := random.random() < 0.5:
            following = fleet.start(number, **settings)
        assert holder.stop(90) == 0
        holder = following if overlaps else fleet.start(number, **settings)
        stopped += 1
    ledger.wait(120)
    assert holder.stop() == 0
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    wait_until_no_key_is_left(client)
    jobs = len(ledger.jobs)
    repeated = steps_done(fleet) / (jobs * steps) - 1
    handed_over = sum(worker.loop_stats()["handed_over"] for worker in fleet.workers)
    assert stopped >= 3
    assert handed_over >= SLOTS
    assert 0 <= repeated <= 0.02
    print(
        f"\n{jobs} jobs of {steps} steps, SIGTERM to {stopped} workers with {grace_s:g} s of grace: 0 lost, every exit"
        f" code 0, {handed_over} hand-overs, {repeated:.2%} of the steps done twice, {time.monotonic() - began:.0f} s"
    )


def send_twice(worker: WorkerProcess, number: signal.Signals) -> None:
    worker.send(number)
    time.sleep(0.3)
    worker.send(number)


@pytest.mark.parametrize(
    ("how", "stop", "codes"),
    [
        ("a second SIGTERM", lambda worker: send_twice(worker, signal.SIGTERM), {0}),
        ("SIGQUIT", lambda worker: worker.send(signal.SIGQUIT), {0, 1}),
    ],
)
def test_at_once_means_at_once_and_the_jobs_go_on_at_their_step(fleet, client, how, stop, codes):
    ledger = Ledger()
    first = fleet.start("first", SDTPU_GRACE_S="600")
    ids = [ledger.add(seed, STEPS) for seed in range(6)]
    wait_for_slots(client)
    began = time.monotonic()
    stop(first)
    assert first.process.wait(60) in codes
    ended_s = time.monotonic() - began
    resumed = [task_id for task_id in ids if client.exists(f"sdtpu:snap:{task_id}")]
    assert len(resumed) == SLOTS
    assert first.loop_stats()["images"] == 0
    second = fleet.start("second", SDTPU_FAKE_STEP_MS="1")
    ledger.wait(90)
    assert second.stop() == 0
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    assert steps_done(fleet) == 6 * STEPS
    assert ended_s < 30
    print(
        f"\n{how}: the worker ends in {ended_s:.1f} s, {first.loop_stats()['job_steps']} of its steps are kept, 0 twice"
    )


@pytest.mark.parametrize(("number", "environment"), [("SIGQUIT", {}), ("SIGTERM", {"REMAP_SIGTERM": "SIGQUIT"})])
def test_celerys_soft_shutdown_is_the_time_that_it_says(fleet, client, number, environment):
    ledger = Ledger()
    soft = ("--", "worker_soft_shutdown_timeout=6.0")
    first = fleet.start("first", *soft, SDTPU_GRACE_S="600", **environment)
    short = [ledger.add(seed, 200) for seed in range(2)]
    wait_for_slots(client, len(short))
    ids = [ledger.add(seed, STEPS) for seed in range(2, 6)]
    wait_for_slots(client)
    began = time.monotonic()
    first.send(signal.Signals[number])
    first.process.wait(60)
    ended_s = time.monotonic() - began
    assert ledger.collect() == len(ids)
    assert set(ledger.results) == set(short), "what can be done in the time is done"
    assert 5.5 < ended_s < 30
    assert all(client.exists(f"sdtpu:snap:{task_id}") for task_id in ids)
    second = fleet.start("second", SDTPU_FAKE_STEP_MS="1")
    ledger.wait(90)
    assert second.stop() == 0
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    assert steps_done(fleet) == 2 * 200 + 4 * STEPS
    print(f"\n{number} with a soft shutdown of 6 s {environment}: ends in {ended_s:.1f} s, no step was done twice")
