"""The device loop on a fake engine: real threads, arithmetic that one can check by hand."""

from __future__ import annotations

import threading

import pytest

from sdtpu_worker.aggregator.loop import DeviceLoop, JobCancelled
from sdtpu_worker.aggregator.plan import Aggregator
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed
from sdtpu_worker.testing import FakeEngine, FakeJob

LANE = (64, 64)


@pytest.fixture
def make_loop():
    loops = []

    def make(engine: FakeEngine, devices: int = 4, slots: int = 2) -> DeviceLoop:
        aggregator = Aggregator([LANE], devices, slots, tick_s=1.0)
        aggregator.observe_step(LANE, 0.25)
        loops.append(DeviceLoop(engine, aggregator))
        loops[-1].start()
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


def test_every_job_gets_its_own_result_from_many_threads(make_loop):
    loop = make_loop(FakeEngine())
    results: dict[int, int] = {}

    def produce(start: int) -> None:
        for i in range(start, start + 25):
            future = loop.submit(FakeJob(str(i), num_inference_steps=1 + i % 13, value=1000 * i))
            results[i] = future.result(10).pixels

    threads = [threading.Thread(target=produce, args=(start,)) for start in range(0, 200, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {i: 1000 * i + 1 + i % 13 for i in range(200)}
    assert loop.stats.images == 200
    assert sum(loop.stats.device_busy_s) <= 4 * loop.stats.active_s + 0.1


def test_a_cancelled_job_leaves_and_the_others_finish(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate), devices=1, slots=1)
    first, second, third = (loop.submit(FakeJob(name, 50)) for name in "abc")
    loop.cancel("a")
    loop.cancel("b")
    loop.cancel("not here")
    gate.set()
    for future in (first, second):
        with pytest.raises(JobCancelled):
            future.result(10)
    assert third.result(10).pixels == 50


def test_a_failing_program_fails_the_jobs_that_have_a_slot_and_the_loop_goes_on(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(fail_at=(1,), gate=gate), devices=1, slots=1)
    futures = [loop.submit(FakeJob(str(i), 20)) for i in range(3)]
    gate.set()
    with pytest.raises(GenerationFailed, match="RuntimeError: the fake device failed"):
        futures[0].result(10)
    assert [future.result(10).pixels for future in futures[1:]] == [20, 20]


def test_a_redelivery_of_a_running_job_joins_it(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate))
    first, second = (loop.submit(FakeJob("same", 5)) for _ in range(2))
    gate.set()
    assert first.result(10).pixels == 5
    assert second.result(10) is first.result(10)
    assert loop.stats.images == 1


def test_a_resolution_that_has_no_lane_fails_its_job_alone(make_loop):
    loop = make_loop(FakeEngine())
    stray, good = loop.submit(FakeJob("stray", 5, lane=(8, 8))), loop.submit(FakeJob("good", 5))
    with pytest.raises(GenerationFailed, match="stray"):
        stray.result(10)
    assert good.result(10).pixels == 5


def test_an_engine_that_cannot_be_reset_ends_the_loop_and_says_so():
    class BrokenEngine(FakeEngine):
        def reset(self) -> None:
            raise RuntimeError("the device is lost")

    died = threading.Event()
    aggregator = Aggregator([LANE], 1, 1, tick_s=1.0)
    loop = DeviceLoop(BrokenEngine(fail_at=(0,)), aggregator, on_death=died.set)
    futures = [loop.submit(FakeJob(str(i), 5)) for i in range(3)]
    loop.start()
    for future, error in zip(futures, (GenerationFailed, EngineUnavailable, EngineUnavailable), strict=True):
        with pytest.raises(error):
            future.result(10)
    assert died.wait(10)
    with pytest.raises(EngineUnavailable):
        loop.submit(FakeJob("late", 1))


def test_closing_fails_what_is_still_here_and_refuses_more(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate), devices=1, slots=1)
    futures = [loop.submit(FakeJob(str(i), 100)) for i in range(3)]
    threading.Timer(0.2, gate.set).start()
    loop.close()
    for future in futures:
        with pytest.raises(EngineUnavailable):
            future.result(10)
    with pytest.raises(EngineUnavailable, match="closed"):
        loop.submit(FakeJob("late", 1))
