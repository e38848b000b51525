"""The device loop on a fake engine: real threads, arithmetic that one can check by hand."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.loop import DeviceLoop, JobCancelled, JobOverdue
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.aggregator.trace import Trace
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed
from sdtpu_worker.testing import FakeEngine, FakeJob, FakeSnapshot

LANE = (64, 64)


def make_policy(devices: int = 1, slots: int = 1, step_s: float = 0.02, tick_s: float = 0.08) -> Aggregator:
    return Aggregator({LANE: TickCosts(devices, Cost(step_s))}, slots, slots + 1, tick_s)


@pytest.fixture
def make_loop():
    loops = []

    def make(engine: FakeEngine, devices: int = 4, slots: int = 2, **options) -> DeviceLoop:
        loops.append(DeviceLoop(engine, make_policy(devices, slots), **options))
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
            future = loop.submit(FakeJob(str(i), num_inference_steps=1 + i % 13, value=1000 * i)).future
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
    first, second, third = (loop.submit(FakeJob(name, 50)).future for name in "abc")
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
    futures = [loop.submit(FakeJob(str(i), 50)).future for i in range(3)]
    gate.set()
    with pytest.raises(GenerationFailed, match="RuntimeError: the fake device failed"):
        futures[0].result(10)
    assert [future.result(10).pixels for future in futures[1:]] == [50, 50]


def test_a_redelivery_of_a_running_job_joins_it(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate))
    first, second = (loop.submit(FakeJob("same", 5)).future for _ in range(2))
    gate.set()
    assert first.result(10).pixels == 5
    assert second.result(10) is first.result(10)
    assert loop.stats.images == 1


def test_a_resolution_that_has_no_lane_fails_its_job_alone(make_loop):
    loop = make_loop(FakeEngine())
    stray, good = (loop.submit(job).future for job in (FakeJob("stray", 5, lane=(8, 8)), FakeJob("good", 5)))
    with pytest.raises(GenerationFailed, match="stray"):
        stray.result(10)
    assert good.result(10).pixels == 5


def test_an_engine_that_cannot_be_reset_ends_the_loop_and_says_so():
    class BrokenEngine(FakeEngine):
        def reset(self) -> None:
            raise RuntimeError("the device is lost")

    died = threading.Event()
    loop = DeviceLoop(BrokenEngine(fail_at=(0,)), make_policy(), on_death=died.set)
    futures = [loop.submit(FakeJob(str(i), 50)).future for i in range(3)]
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
    futures = [loop.submit(FakeJob(str(i), 100)).future for i in range(3)]
    threading.Timer(0.2, gate.set).start()
    loop.close()
    for future in futures:
        with pytest.raises(EngineUnavailable):
            future.result(10)
    with pytest.raises(EngineUnavailable, match="closed"):
        loop.submit(FakeJob("late", 1))


def wait_until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def test_an_urgent_job_parks_another_which_ends_with_the_same_result(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    low = loop.submit(FakeJob("low", 300, value=7000), Terms(priority=9))
    wait_until(lambda: low.progress.current > 20)
    urgent = loop.submit(FakeJob("urgent", 10), Terms(priority=0))
    assert urgent.future.result(10).pixels == 10
    assert not low.future.done()
    assert low.future.result(10).pixels == 7300
    assert loop.stats.preemptions == 1
    assert loop.stats.steps == 310, "no step was repeated"


def test_progress_only_grows_and_says_when_a_job_waits(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    first, second = loop.submit(FakeJob("first", 200), Terms(priority=9)), loop.submit(FakeJob("second", 40))
    seen: dict[str, list] = {"first": [], "second": []}
    while not (first.future.done() and second.future.done()):
        for submission in (first, second):
            if submission.progress not in seen[submission.job.task_id][-1:]:
                seen[submission.job.task_id].append(submission.progress)
        time.sleep(0.001)
    for steps in seen.values():
        assert [progress.current for progress in steps] == sorted(progress.current for progress in steps)
        assert {progress.total for progress in steps} <= {200, 40}
    assert seen["second"][0].pending
    assert seen["second"][0].description == "waiting for a slot"
    assert any(progress.eta_s for progress in seen["first"])
    assert {progress.description for progress in seen["first"]} >= {"denoising"}


def test_a_job_that_may_not_start_any_more_leaves_at_the_next_tick(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate), devices=1, slots=1)
    wanted = threading.Event()
    wanted.set()
    first = loop.submit(FakeJob("first", 50))
    second = loop.submit(FakeJob("second", 5), may_start=wanted.is_set)
    third = loop.submit(FakeJob("third", 5))
    wanted.clear()
    gate.set()
    with pytest.raises(JobCancelled):
        second.future.result(10)
    assert first.future.result(10).pixels == 50
    assert third.future.result(10).pixels == 5


def test_limits_and_deadlines_end_a_job_with_the_reason(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    slow = loop.submit(FakeJob("slow", 100_000), Terms(soft_time_limit_s=0.2))
    wait_until(lambda: slow.started_at is not None)
    late = loop.submit(FakeJob("late", 5), Terms(expires_at=time.monotonic() + 0.1))
    for submission, reason in ((late, Overdue.EXPIRED), (slow, Overdue.SOFT_TIME_LIMIT)):
        with pytest.raises(JobOverdue) as raised:
            submission.future.result(10)
        assert raised.value.reason is reason


def test_the_next_tick_is_dispatched_before_the_running_one_ends_and_takes_who_came_meanwhile(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(2, Cost(0.02))})
    loop = make_loop(engine, devices=2, slots=1)
    first = loop.submit(FakeJob("first", 40))
    wait_until(lambda: first.progress.current >= 4)
    asked_at = time.monotonic()
    second = loop.submit(FakeJob("second", 4))
    started_at = second.future.result(10).started_at
    assert started_at - asked_at < 0.15, "within the tick that ran"
    first.future.result(10)
    assert sum(loop.stats.device_busy_s) > 0.9 * 44 * 0.02, "the devices never waited for the host"


def test_a_trace_shows_every_devices_work_and_the_hosts(make_loop, tmp_path):
    costs = {LANE: Cost(0.002, 0.001, 0.003)}
    trace = Trace(tmp_path / "trace.json", costs, 2)
    loop = make_loop(FakeEngine(), devices=2, slots=1, trace=trace)
    futures = [loop.submit(FakeJob(str(i), 10)).future for i in range(6)]
    for future in futures:
        future.result(10)
    with trace.span("encode", "0"):
        pass
    loop.close()
    events = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event]
    names = Counter(event["name"] for event in events if event["ph"] == "X")
    assert (names["insert"], names["decode"], names["encode"]) == (6, 6, 1)
    assert {event["tid"] for event in events if event["ph"] == "X" and event["pid"] == 1} == {0, 1}
    assert sum(event["args"]["steps"] for event in events if event["name"] == "advance") == 60
    assert any(event["ph"] == "C" and event["args"]["slots in use"] == 2 for event in events)


def test_a_job_handed_over_with_its_state_goes_on_where_it_was(make_loop):
    loop = make_loop(FakeEngine(), devices=1, slots=1)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    submission = loop.submit(FakeJob("moved", 12, value=100), snapshot=state)
    assert submission.progress.current == 5
    assert submission.future.result(10).pixels == 112
    assert loop.stats.steps == 7


def test_a_state_of_another_configuration_is_dropped_and_the_job_starts_anew(make_loop, caplog):
    loop = make_loop(FakeEngine(), devices=1, slots=1)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7, fingerprint="another")
    submission = loop.submit(FakeJob("moved", 12, value=100), snapshot=state)
    assert submission.future.result(10).pixels == 112
    assert loop.stats.steps == 12
    assert "starts anew" in caplog.text


def test_a_parked_job_survives_a_failure_of_the_devices(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    low = loop.submit(FakeJob("low", 300, value=7000), Terms(priority=9))
    wait_until(lambda: low.progress.current > 20)
    urgent = loop.submit(FakeJob("urgent", 500), Terms(priority=0))
    wait_until(lambda: low.parked)
    engine.fail_late_at = (engine.calls,)
    with pytest.raises(GenerationFailed):
        urgent.future.result(10)
    assert low.future.result(10).pixels == 7300


wishes = st.lists(
    st.tuples(
        st.sampled_from((LANE, (64, 128))),
        st.integers(1, 60),  # steps
        st.integers(0, 9),  # priority
        st.booleans(),  # an earlier one is cancelled
        st.sampled_from((math.inf, math.inf, math.inf, 0.0)),  # seconds until it expires
    ),
    min_size=1,
    max_size=40,
)
faults = st.sets(st.integers(0, 12), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(wishes, st.integers(1, 4), st.integers(1, 3), faults, faults)
def test_every_job_ends_once_with_its_own_result_whatever_comes_is_cancelled_or_fails(
    wishes, devices, slots, fail_at, fail_late_at
):
    costs = {lane: TickCosts(devices, Cost(0.02, 0.005, 0.03)) for lane in (LANE, (64, 128))}
    engine = FakeEngine(fail_at=fail_at, fail_late_at=fail_late_at)
    loop = DeviceLoop(engine, Aggregator(costs, slots, slots + 1, 0.1))
    loop.start()
    submissions, cancelled = [], set()
    for i, (lane, steps, priority, cancels, expires_s) in enumerate(wishes):
        terms = Terms(priority, time.monotonic() + expires_s)
        submissions.append(loop.submit(FakeJob(str(i), steps, lane, 1000 * i), terms))
        if cancels:
            cancelled.add(str(i // 2))
            loop.cancel(str(i // 2))
    for i, (submission, (_, steps, _, _, expires_s)) in enumerate(zip(submissions, wishes, strict=True)):
        error = submission.future.exception(10)
        if error is None:
            assert submission.future.result().pixels == 1000 * i + steps
        else:
            assert isinstance(error, JobCancelled | JobOverdue | GenerationFailed)
            assert not isinstance(error, JobCancelled) or str(i) in cancelled
            assert not isinstance(error, JobOverdue) or expires_s == 0.0
            assert not isinstance(error, GenerationFailed) or fail_at or fail_late_at
    wait_until(lambda: not any(engine.slots.values()) or cancelled or fail_at or fail_late_at)
    assert loop.stats.images == sum(submission.future.exception() is None for submission in submissions)
    loop.close()
