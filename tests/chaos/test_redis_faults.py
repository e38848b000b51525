"""Redis dies, is cut off and is slow, under load: no job is lost, none runs twice.

    pytest -s tests/chaos/test_redis_faults.py -n 0            # a minute, in CI
    pytest -s tests/chaos/test_redis_faults.py -n 0 --long     # the full form

Two workers reach Redis through a proxy, the client reaches it directly. What ran twice shows in the devices' step
counters: the steps that jobs took, less the steps that their pictures needed.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from functools import partial

import pytest
from redis.exceptions import RedisError

from sdtpu_worker.errors import BrokerUnavailable
from sdtpu_worker.operations.health import WorkerHealth
from sdtpu_worker.testing.processes import free_port, wait_for_line
from tests.chaos.fleet import Fleet, Ledger, WorkerProcess, wait_until_no_key_is_left
from tests.chaos.health_log import HealthLog
from tests.chaos.proxies import FlakyProxy
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

STEP_MS, LEASE_S = 20, 8.0
SLACK_S = 2.5
"""How much later than it should a verdict may change: the lease's pulse is every second, and the machine is busy."""


class Stage:
    """Redis, a proxy, two workers behind it, and a seeded client."""

    def __init__(self, stack: contextlib.ExitStack, folder) -> None:
        self.rng = random.Random(9)
        self.ledger = Ledger()
        # with `everysec` a killed Redis forgets up to two seconds of claims and results while the disk is slow
        self.server = stack.enter_context(RedisServer({"appendfsync": "always"}))
        self.proxy = stack.enter_context(FlakyProxy(self.server.url))
        self.app = stack.enter_context(client_app(self.server.url))
        settings = {"SDTPU_FAKE_STEP_MS": STEP_MS, "SDTPU_CPU_DEVICES": 4, "SDTPU_LEASE_S": LEASE_S}
        self.fleet = stack.enter_context(
            Fleet(self.proxy.url, folder, **{name: str(value) for name, value in settings.items()})
        )
        self.logs = []
        for name in ("a", "b"):
            port = free_port()
            self.fleet.launch(name, SDTPU_HEALTH_ADDRESS=f"127.0.0.1:{port}")
            self.logs.append(stack.enter_context(HealthLog(port)))
        wait_until(lambda: all(log.samples and log.samples[-1].ready for log in self.logs), "the workers", 120)

    @property
    def workers(self) -> list[WorkerProcess]:
        """Both workers."""
        return self.fleet.workers

    def send(self, count: int, over_s: float = 0.0, **options) -> list[str]:
        """Enqueue jobs, evenly over a time."""
        ids, begin = [], time.monotonic()
        for i in range(count):
            time.sleep(max(0.0, begin + over_s * i / count - time.monotonic()))
            ids.append(self.ledger.add(self.rng.randrange(1, 2**31), self.rng.randrange(10, 51), **options))
        return ids

    def are_done(self, ids: list[str]) -> bool:
        """Whether these jobs are."""
        self.ledger.collect()
        return self.ledger.results.keys() >= set(ids)

    def consumes_again_s(self) -> float:
        """Return how long it takes until each worker has taken new jobs, and those are done."""
        begin, counts = time.monotonic(), [_received(worker) for worker in self.workers]
        while True:
            ids = self.send(4, priority=0)
            wait_until(partial(self.are_done, ids), "new jobs")
            if all(_received(worker) > count for worker, count in zip(self.workers, counts, strict=True)):
                return time.monotonic() - begin

    def job_steps(self) -> int:
        """Return the steps that jobs have taken on the devices so far."""
        for _ in range(5):
            stats: dict = {}
            with contextlib.suppress(RedisError):  # of a connection that the test has cut
                stats = self.app.control.inspect(timeout=20, limit=2).stats() or {}
            if len(stats) == 2:
                return sum(each["pool"]["sdtpu"]["loop"]["job_steps"] for each in stats.values())
        raise AssertionError(f"a worker does not answer: {list(stats)}")

    def device_s_per_step(self, ids: list[str]) -> float:
        """Return the time that a step of these jobs took, at the median."""
        jobs = [(self.ledger.results[task_id]["timings"]["device_s"], self.ledger.jobs[task_id][2]) for task_id in ids]
        return statistics.median(device_s / steps for device_s, steps in jobs)

    def finish(self, name: str, begun: int, steps_before: int, figures: str = "") -> None:
        """Wait for every job, check that all is well, print a line."""
        self.ledger.wait(120)
        ids = list(self.ledger.jobs)[begun:]
        with contextlib.closing(self.server.client()) as client:
            wait_until_no_key_is_left(client)
        needed = sum(self.ledger.jobs[task_id][2] for task_id in ids)
        repeated = self.job_steps() - steps_before - needed
        print(
            f"\n{name}: {len(ids)} jobs, {len(self.ledger.errors)} failed or lost, {needed} steps needed,"
            f" {repeated} repeated{figures}"
        )
        assert not self.ledger.errors
        assert not self.ledger.wrong_pictures()
        assert repeated == 0
        assert all(worker.is_running for worker in self.workers)
        assert [log.silent() for log in self.logs] == [0, 0]

    def check_verdicts(self, lost_at: float, back_at: float, consumed_at: float) -> None:
        """Check what the health endpoints said around a time without Redis."""
        for log in self.logs:
            soon = log.between(lost_at, min(back_at, lost_at + WorkerHealth.CONTACT_READY_S - 1))
            assert all(sample.ready for sample in soon), "not ready too early"
            alive = log.between(lost_at, min(back_at, lost_at + LEASE_S - 1))
            assert all(sample.live for sample in alive), "dead too early"
            late = log.between(lost_at + WorkerHealth.CONTACT_READY_S + SLACK_S, back_at)
            assert not any(sample.ready for sample in late), "ready without Redis"
            later = log.between(lost_at + LEASE_S + SLACK_S, back_at)
            assert not any(sample.live for sample in later), "alive without Redis for more than a lease"
            after = log.between(consumed_at + SLACK_S, consumed_at + 60)
            assert all(sample.ready and sample.live for sample in after), "not ready though it consumes"


def _received(worker: WorkerProcess) -> int:
    return worker.text().count("] received")


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        yield Stage(stack, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def before(stage: Stage) -> tuple[int, int]:
    """Give how many jobs there were, and how many steps they had taken."""
    return len(stage.ledger.jobs), stage.job_steps()


def test_redis_is_killed_and_restarted(stage: Stage, before: tuple[int, int], long: bool):
    again_s = []
    for _ in range(5 if long else 2):
        stage.send(60 if long else 24, over_s=3 if long else 1.5)
        lost_at = time.monotonic()
        stage.server.kill()
        with pytest.raises(BrokerUnavailable):
            stage.send(1)
        time.sleep(max(0.0, lost_at + stage.rng.uniform(1, 3) - time.monotonic()))
        stage.server.start()
        back_at = time.monotonic()
        again_s.append(stage.consumes_again_s())
        stage.check_verdicts(lost_at, back_at, time.monotonic())
    stage.finish(
        "Redis killed and restarted", *before,
        f"; {len(again_s)} kills, both workers had done new jobs {max(again_s):.1f} s after it was back at the latest",
    )  # fmt: skip
    assert max(again_s) < 30


def test_an_outage_is_longer_than_the_lease(stage: Stage, before: tuple[int, int], long: bool):
    again_s = []
    for _ in range(3 if long else 1):
        stage.send(40, over_s=0.5)
        lost_at = time.monotonic()
        stage.proxy.cut()
        time.sleep((3 if long else 1) * LEASE_S + SLACK_S + 1)
        stage.proxy.restore()
        back_at = time.monotonic()
        again_s.append(stage.consumes_again_s())
        stage.check_verdicts(lost_at, back_at, time.monotonic())
    stage.finish("cut off for longer than the lease", *before, f"; consumed again after {max(again_s):.1f} s")
    assert max(again_s) < 30


def test_connections_are_dropped_again_and_again(stage: Stage, before: tuple[int, int], long: bool):
    drops = 0
    with contextlib.closing(stage.server.client()) as admin:
        for _ in range(20 if long else 3):
            for kill in (
                stage.proxy.drop_connections,
                lambda: admin.client_kill_filter(_type="normal", skipme=True),
                lambda: admin.client_kill_filter(_type="pubsub", skipme=True),
            ):
                stage.send(6, over_s=stage.rng.uniform(0.2, 0.6))
                kill()
                drops += 1
        stage.proxy.cut()
        time.sleep(2)
        stage.proxy.restore()
        again_s = stage.consumes_again_s()
    stage.finish("connections dropped", *before, f"; {drops} times, cut for 2 s, consumed {again_s:.1f} s after it")
    assert again_s < 30


def test_redis_is_slow(stage: Stage, before: tuple[int, int], long: bool):
    count = 200 if long else 24
    fast = stage.send(count, over_s=count / 20)
    stage.ledger.wait(90)
    slow: list[str] = []
    for delay_s in (0.05, 0.2):
        stage.proxy.delay(delay_s)
        slow += stage.send(count // 2, over_s=count / 20)
        wait_until(partial(stage.are_done, slow), "the jobs of a slow Redis", 90)
    stage.proxy.delay(0)
    for _ in range(5 if long else 1):
        frozen = stage.send(24)
        stage.server.pause(2.5)
        time.sleep(2.5)
        stage.ledger.wait(90)
        slow += frozen
    fast_s, slow_s = stage.device_s_per_step(fast), stage.device_s_per_step(slow)
    stage.finish(
        "slow Redis", *before, f"; a step on the device {1000 * fast_s:.1f} ms, with 50-200 ms of delay or a Redis"
        f" that is frozen for 2.5 s {1000 * slow_s:.1f} ms",
    )  # fmt: skip
    assert slow_s < 1.5 * fast_s


def test_the_workers_end_in_good_order(stage: Stage):
    for worker in stage.workers:
        worker.process.terminate()
    assert [worker.process.wait(60) for worker in stage.workers] == [0, 0]
    assert not any("Traceback" in worker.text() for worker in stage.workers)


def test_a_worker_that_starts_before_its_redis_waits_for_it_and_serves(tmp_path):
    with RedisServer() as server, client_app(server.url), Fleet(server.url, tmp_path) as fleet:
        server.stop()
        worker = fleet.launch("early")
        wait_for_line(worker.process, worker.log, "Redis cannot be reached yet", 60)
        wait_for_line(worker.process, worker.log, "Cannot connect to redis://", 60)
        server.start()
        ledger = Ledger()
        ledger.add(seed=3, steps=5)
        ledger.wait(60)
        assert worker.stop() == 0


def test_a_worker_that_starts_before_a_redis_with_too_few_connections_is_refused_when_it_comes(tmp_path):
    with RedisServer({"maxclients": "30"}) as server, Fleet(server.url, tmp_path, SDTPU_CPU_DEVICES="8") as fleet:
        server.stop()
        worker = fleet.launch("early")
        wait_for_line(worker.process, worker.log, "Cannot connect to redis://", 60)
        server.start()
        wait_for_line(worker.process, worker.log, "ConfigurationError: Redis grants 30 connections", 60)
        assert worker.process.wait(60) == 1
