"""Sick devices: found out by the jobs that fail on them and nowhere else, and given no job any more."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.device_loop.device_records import FORGIVEN_AFTER, MOST_STRIKES, DeviceRecords
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.submission import JobHandedOver
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob, FakeSnapshot
from tests.support.waiting import wait_until

LANE = (64, 64)


@pytest.fixture
def make_loop():
    loops = []

    def make(engine: FakeEngine, devices: int = 8, slots: int = 1, **options) -> DeviceLoop:
        policy = Aggregator({LANE: TickCosts(devices, Cost(0.02))}, slots, slots + 1, 0.08)
        loops.append(DeviceLoop(engine, policy, **options))
        loops[-1].start()
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


def run_jobs(loop: DeviceLoop, count: int, start: int = 0) -> list[Any]:
    """Submit jobs at once; return for each whether its image is right, or the exception that it ended with."""
    numbers = range(start, start + count)
    submissions = [loop.submit(FakeJob(str(i), 10 + i % 7, value=1000 * i)) for i in numbers]
    errors = [submission.future.exception(60) for submission in submissions]
    return [
        error or submission.future.result().pixels == 1000 * i + 10 + i % 7
        for i, submission, error in zip(numbers, submissions, errors, strict=True)
    ]


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("kind", ["nan_devices", "raising_devices"])
@pytest.mark.parametrize(("sick", "slots"), [(0, 1), (5, 1), (7, 3)])
def test_a_sick_device_costs_no_job_its_image(make_loop, kind, sick, slots, unseen):
    """The second try, alone, was always on device 0: with a sick device 0 one job in eight failed for good."""
    engine = FakeEngine(unseen={sick} if unseen else ())
    setattr(engine, kind, {sick})
    loop = make_loop(engine, slots=slots)
    assert run_jobs(loop, 100) == [True] * 100
    assert loop.alive


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize(("sick", "slots"), [(0, 1), (5, 1), (7, 3)])
def test_a_device_that_gives_nan_is_found_out_and_gets_no_job_any_more(make_loop, caplog, sick, slots, unseen):
    """With a sick device 5 all jobs took twice as long, for ever."""
    engine = FakeEngine(nan_devices={sick}, unseen={sick} if unseen else ())
    loop = make_loop(engine, slots=slots)
    assert run_jobs(loop, 160) == [True] * 160
    assert loop.stats.lost_devices == [sick]
    assert loop.stats.to_json()["lost_devices"] == [sick]
    assert f"device {sick} is lost" in caplog.text
    assert "7 devices are left" in caplog.text
    retried, busy_s = loop.stats.retried, loop.stats.device_busy_s[sick]
    assert run_jobs(loop, 80, 160) == [True] * 80
    assert (loop.stats.retried, loop.stats.device_busy_s[sick]) == (retried, busy_s)


@pytest.mark.parametrize("sick", [0, 5])
def test_a_device_that_breaks_every_program_is_lost_after_the_first_and_blamed_on_no_job(make_loop, sick):
    """The proof after a failure ended the whole worker when one device did not pass it."""
    loop = make_loop(FakeEngine(raising_devices={sick}))
    assert run_jobs(loop, 40) == [True] * 40
    assert loop.stats.lost_devices == [sick]
    assert loop.stats.failures == 1


def test_the_device_that_jobs_are_alone_on_is_found_out_when_it_breaks_programs_but_passes_checks(
    make_loop,
):
    loop = make_loop(FakeEngine(raising_devices={0}, unseen={0}))
    assert run_jobs(loop, 60) == [True] * 60
    assert loop.stats.lost_devices == [0]


@pytest.mark.parametrize("unseen", [(), (3,)])
def test_two_sick_devices_are_both_found_out(make_loop, unseen):
    loop = make_loop(FakeEngine(nan_devices={0, 3}, unseen=unseen))
    assert run_jobs(loop, 160) == [True] * 160
    assert sorted(loop.stats.lost_devices) == [0, 3]


def test_a_job_at_fault_fails_on_two_devices_and_no_device_is_blamed(make_loop):
    jobs = [f"bad {i}" for i in range(2 * MOST_STRIKES)]
    engine = FakeEngine(nan=frozenset(jobs), poison=frozenset(["poison"]))
    loop = make_loop(engine)
    bad = [loop.submit(FakeJob(name, 5)) for name in (*jobs, "poison")]
    good = run_jobs(loop, 20)
    for submission in bad:
        assert isinstance(submission.future.exception(60), GenerationFailed)
        assert len(submission.failed_on) == 2
    assert good == [True] * 20
    assert loop.stats.lost_devices == []


def test_a_job_is_not_at_fault_for_one_passing_failure_of_the_only_device_that_is_not_lost(make_loop):
    class Unlucky(FakeEngine):
        def execute(self, plan, jobs, snapshots=None):
            if 1 in plan.placed().values() and not self.fail_late_at:
                self.fail_late_at = (self.calls,)
            return super().execute(plan, jobs, snapshots)

    loop = make_loop(Unlucky(nan_devices={0}), devices=2)
    assert loop.submit(FakeJob("it", 5, value=100)).future.result(60).pixels == 105
    assert loop.stats.lost_devices == [0]
    assert (loop.stats.failures, loop.stats.retried) == (1, 2)


def test_a_job_that_has_nowhere_else_to_go_fails_after_its_try_alone(make_loop):
    loop = make_loop(FakeEngine(nan_devices={0}, unseen={0}), devices=1)
    with pytest.raises(GenerationFailed, match="NaN or infinite values for this request on device 0"):
        loop.submit(FakeJob("it", 5)).future.result(60)
    assert loop.stats.retried == 1
    assert loop.alive


def test_a_worker_whose_last_device_is_lost_hands_its_jobs_over_and_ends(make_loop):
    died = threading.Event()
    loop = make_loop(FakeEngine(nan_devices={0, 1}), devices=2, on_death=died.set)
    for submission in [loop.submit(FakeJob(str(i), 5)) for i in range(6)]:
        assert isinstance(submission.future.exception(60), JobHandedOver)
    assert died.wait(60)


def test_a_device_that_differs_at_the_start_gets_no_job(make_loop):
    engine = FakeEngine(lost_devices={2}, nan_devices={2})
    loop = make_loop(engine, devices=3)
    assert run_jobs(loop, 20) == [True] * 20
    assert loop.stats.lost_devices == [2]
    assert loop.stats.retried == 0
    with pytest.raises(EngineUnavailable, match="device 0 was the last one"):
        make_loop(FakeEngine(lost_devices={0}), devices=1)


def test_the_state_of_a_job_that_leaves_a_sick_device_with_nan_is_not_used_again(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=2)
    low = [loop.submit(FakeJob(f"low {i}", 1000, value=7000), Terms(priority=9)) for i in range(2)]
    wait_until(lambda: all(submission.progress.current > 20 for submission in low))
    sick = low[0].device
    engine.nan_devices = {sick}
    wait_until(lambda: any(state.value < 0 for state in engine.slots.copy().values()))
    urgent = [loop.submit(FakeJob(f"urgent {i}", 20, value=500), Terms(priority=0)) for i in range(2)]
    assert [submission.future.result(60).pixels for submission in urgent] == [520, 520]
    assert [submission.future.result(60).pixels for submission in low] == [8000, 8000]
    assert loop.stats.lost_devices == [sick]


def test_a_state_with_nan_is_not_handed_over(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}, nan_devices={0})
    loop = make_loop(engine, devices=1)
    submission = loop.submit(FakeJob("it", 5000))
    wait_until(lambda: submission.progress.current > 20)
    loop.drain(0)
    end = submission.future.exception(60)
    assert isinstance(end, JobHandedOver)
    assert end.snapshot is None


def test_what_comes_from_another_worker_speaks_against_no_device_here(make_loop, caplog):
    """Whoever can write to Redis could otherwise have healthy devices taken out of service."""

    class Passing(FakeEngine):
        def execute(self, plan, jobs, snapshots=None):
            tick = super().execute(plan, jobs, snapshots)
            self.nan -= {task_id for *_, task_id in plan.decoded()}
            return tick

    jobs = [f"overflows {i}" for i in range(2 * MOST_STRIKES)]
    loop = make_loop(Passing(nan=frozenset(jobs)), devices=2)
    forged = FakeSnapshot("forged", value=-5, step=5, steps_left=7)
    assert loop.submit(FakeJob("forged", 12, value=100), snapshot=forged).future.result(60).pixels == 112
    assert "starts anew" in caplog.text
    for name in jobs:  # finite when it comes, not when it is done
        submission = loop.submit(FakeJob(name, 12, value=100), snapshot=FakeSnapshot(name, 7, step=5, steps_left=7))
        assert submission.future.result(60).pixels == 112
        assert not submission.failed_on
    assert loop.stats.retried == len(jobs)
    assert loop.stats.lost_devices == []


def test_three_strikes_are_of_different_jobs_and_a_hundred_images_make_up_for_them():
    records = DeviceRecords()
    for _ in range(5):
        records.strike(3, "one job")
    assert records.struck_out() == set()
    records.strike(3, "another job")
    for _ in range(FORGIVEN_AFTER - 1):
        records.well_done(3)
    records.strike(4, "a third job")
    assert records.struck_out() == set()
    records.strike(3, "a third job")
    assert records.struck_out() == {3}
    records = DeviceRecords()
    records.strike(3, "one job")
    records.strike(3, "another job")
    for _ in range(FORGIVEN_AFTER):
        records.well_done(3)
    records.strike(3, "a third job")
    assert records.struck_out() == set()
