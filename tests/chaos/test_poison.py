"""Jobs that kill or break whatever runs them fail alone, and everybody else's job is done.

    python -m pytest tests/chaos/test_poison.py -n 0 -s

One of 100 jobs ends the process whenever it gets a slot (SIGKILL), or loses the devices (exit code 75); workers that
end are started again. It fails with `DeliveryLimitExceeded` after three workers died of it, and the 99 others succeed,
though up to seven of them were on the devices with it. One of 100 makes the device program raise, or gives no
picture: it fails alone with the cause, and no worker dies.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from random import Random

import pytest
import redis

from sdtpu_worker import DeliveryLimitExceeded, GenerationFailed
from sdtpu_worker.worker.process_ends import EX_ENGINE_LOST
from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "4",
    "SDTPU_FAKE_STEP_MS": "2",
    "SDTPU_TICK_S": "0.05",
    "SDTPU_LEASE_S": "4",
    "SDTPU_MAX_DELIVERIES": "3",
}
JOBS = 100


@pytest.fixture
def jobs(tmp_path):
    """Yield the jobs, and the fleet that will do them."""
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        yield Jobs(client), fleet


class Jobs:
    """Jobs with a bad one in their midst."""

    def __init__(self, client: redis.Redis) -> None:
        self._client, self.ledger = client, Ledger()

    def add(self, prompt: str, seed: int) -> None:
        """Enqueue them; `prompt` is that of the bad one."""
        random = Random(seed)
        at = random.randrange(JOBS // 4, JOBS // 2)
        ids = [self.ledger.add(i, random.randint(10, 60), prompt if i == at else "x") for i in range(JOBS)]
        self._bad = ids[at]

    def only_error(self, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> Exception:
        """Wait for all; return what the bad one failed with, when all others are done and nothing is left of any."""
        self.ledger.wait(timeout_s, meanwhile)
        wait_until_no_key_is_left(self._client)
        error = self.ledger.errors.pop(self._bad)
        assert not self.ledger.errors
        assert len(self.ledger.results) == JOBS - 1
        assert not self.ledger.wrong_pictures()
        return error


@pytest.mark.parametrize(("prompt", "code"), [("kill", -9), ("lose", EX_ENGINE_LOST)])
def test_a_job_that_ends_its_worker_fails_after_three_of_them_and_alone(jobs, prompt, code):
    jobs, fleet = jobs
    jobs.add(prompt, 30)
    workers = [fleet.launch(name) for name in ("a", "b")]

    def supervise() -> None:
        for i, worker in enumerate(workers):
            if not worker.is_running:
                workers[i] = fleet.launch(worker.name)

    error = jobs.only_error(180, supervise)
    assert isinstance(error, DeliveryLimitExceeded)
    wait_until(lambda: sum(not worker.is_running for worker in fleet.workers) >= 3, "the third to end")
    dead = [worker for worker in fleet.workers if not worker.is_running]
    assert [worker.process.returncode for worker in dead] == [code] * 3
    assert sorted(re.findall(r"(\w+)@chaos", str(error))) == sorted(worker.name for worker in dead)
    print(f"\n{JOBS} jobs, one of {prompt!r}: {len(dead)} workers ended, the others are done, 1 failed: {error}")


@pytest.mark.parametrize(("prompt", "cause"), [("raise", "the fake device failed on"), ("nan", "NaN or infinite")])
def test_a_job_that_breaks_the_device_program_fails_alone_and_no_worker_dies(jobs, prompt, cause):
    jobs, fleet = jobs
    jobs.add(prompt, 31)
    worker = fleet.launch("a")
    error = jobs.only_error(90)
    assert isinstance(error, GenerationFailed)
    assert cause in str(error)
    assert worker.is_running
    assert worker.stop() == 0
    stats = worker.loop_stats()
    print(
        f"\n{JOBS} jobs, one of {prompt!r}: the others are done, 1 failed, no worker died;"
        f" {stats['failures']} device failures, {stats['retried']} retries"
    )
