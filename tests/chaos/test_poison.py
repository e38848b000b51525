"""Jobs that kill or break whatever runs them fail alone, and everybody else's job is done.

    python -m pytest tests/chaos/test_poison.py -n 0 -s

One of 100 jobs ends the process whenever it gets a slot (SIGKILL), or loses the devices (exit code 75); workers that
end are started again. It fails with `DeliveryLimitExceeded` after three workers died of it, and the 99 others succeed,
though up to seven of them were on the devices with it. One of 100 makes the device program raise, or gives no
picture: it fails alone with the cause, and no worker dies.
"""

from __future__ import annotations

import contextlib
from random import Random

import pytest

from sdtpu_worker import DeliveryLimitExceeded, GenerationFailed
from sdtpu_worker.worker import EX_ENGINE_LOST
from tests.chaos.fleet import Fleet, Ledger, client_app, keys_left
from tests.chaos.servers import RedisServer, wait_until

pytestmark = [pytest.mark.slow]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "4",
    "SDTPU_FAKE_STEP_MS": "2",
    "SDTPU_TICK_S": "0.05",
    "SDTPU_LEASE_S": "1",
    "SDTPU_MAX_DELIVERIES": "3",
}
JOBS = 100


def add_jobs(ledger: Ledger, prompt: str, random: Random) -> str:
    """Enqueue them with one bad one in their midst; return its id."""
    at = random.randrange(JOBS // 4, JOBS // 2)
    ids = [ledger.add(seed, random.randint(10, 60), prompt if seed == at else "x") for seed in range(JOBS)]
    return ids[at]


@pytest.mark.parametrize(("prompt", "code"), [("kill", -9), ("lose", EX_ENGINE_LOST)])
def test_a_job_that_ends_its_worker_fails_after_three_of_them_and_alone(tmp_path, prompt, code):
    random, ledger = Random(30), Ledger()
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        poison = add_jobs(ledger, prompt, random)
        workers = [fleet.launch(name) for name in ("a", "b")]

        def supervise() -> None:
            for i, worker in enumerate(workers):
                if not worker.is_running:
                    workers[i] = fleet.launch(f"w{len(fleet.workers)}")

        ledger.wait(90, supervise)
        wait_until(lambda: not keys_left(client), "no key of a job to be left")
        error = ledger.errors.pop(poison)
        assert isinstance(error, DeliveryLimitExceeded)
        assert not ledger.errors
        wait_until(lambda: sum(not worker.is_running for worker in fleet.workers) >= 3, "the third to end")
        dead = [worker for worker in fleet.workers if not worker.is_running]
        assert [worker.process.returncode for worker in dead] == [code] * 3
        for worker in dead:
            assert f"{worker.name}@chaos" in str(error)
        assert not ledger.wrong_pictures()
        assert len(ledger.results) == JOBS - 1
    print(f"\n{JOBS} jobs, one of {prompt!r}: {len(dead)} workers ended, {len(ledger.results)} done, 1 failed: {error}")


@pytest.mark.parametrize(("prompt", "cause"), [("raise", "the fake device failed on"), ("nan", "NaN or infinite")])
def test_a_job_that_breaks_the_device_program_fails_alone_and_no_worker_dies(tmp_path, prompt, cause):
    random, ledger = Random(31), Ledger()
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        poison = add_jobs(ledger, prompt, random)
        worker = fleet.launch("a")
        ledger.wait(60)
        wait_until(lambda: not keys_left(client), "no key of a job to be left")
        error = ledger.errors.pop(poison)
        assert isinstance(error, GenerationFailed)
        assert cause in str(error)
        assert not ledger.errors
        assert len(ledger.results) == JOBS - 1
        assert not ledger.wrong_pictures()
        assert worker.is_running
        assert worker.stop() == 0
        stats = worker.loop_stats()
    print(
        f"\n{JOBS} jobs, one of {prompt!r}: {len(ledger.results)} done, 1 failed, no worker died;"
        f" {stats['failures']} device failures, {stats['retried']} retries"
    )
