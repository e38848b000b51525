"""The device loop on a fake engine: real threads, arithmetic that one can check by hand."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.plan import Outcome
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.stages import JobStage, LoopStage
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue
from sdtpu_worker.device_loop.trace import Trace
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob, FakeSnapshot
from tests.support.waiting import wait_until

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


def test_a_fake_engine_gets_no_slower_by_what_a_policy_learns():
    costs = {LANE: TickCosts(1, Cost(0.001))}
    engine, policy = FakeEngine(costs=costs), Aggregator(costs, 1, 2, 0.01)
    policy.add("a", LANE, 4, now=0.0)
    plan = policy.plan(now=0.0)
    for _ in range(100):
        policy.update(Outcome(plan, 10.0))
    assert policy.expected_s(plan) > 5
    asked_at = time.monotonic()
    engine.execute(plan, {"a": FakeJob("a", 4)}).wait()
    assert time.monotonic() - asked_at < 5


def test_every_job_gets_its_own_result_from_many_threads(make_loop):
    loop = make_loop(FakeEngine())
    results: dict[int, int] = {}

    def produce(start: int) -> None:
        for i in range(start, start + 25):
            future = loop.submit(FakeJob(str(i), num_steps=1 + i % 13, value=1000 * i)).future
            results[i] = future.result(60).pixels

    threads = [threading.Thread(target=produce, args=(start,)) for start in range(0, 200, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
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
            future.result(60)
    assert third.result(60).pixels == 50


def test_a_redelivery_of_a_running_job_joins_it(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate))
    first, second = (loop.submit(FakeJob("same", 5)).future for _ in range(2))
    gate.set()
    assert first.result(60).pixels == 5
    assert second.result(60) is first.result(60)
    assert loop.stats.images == 1


def test_a_resolution_that_has_no_lane_fails_its_job_alone(make_loop):
    loop = make_loop(FakeEngine())
    stray, good = (loop.submit(job).future for job in (FakeJob("stray", 5, lane=(8, 8)), FakeJob("good", 5)))
    with pytest.raises(GenerationFailed, match="stray"):
        stray.result(60)
    assert good.result(60).pixels == 5


def test_closing_fails_what_is_still_here_and_refuses_more(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate), devices=1, slots=1)
    futures = [loop.submit(FakeJob(str(i), 100)).future for i in range(3)]
    threading.Timer(0.2, gate.set).start()
    loop.close()
    for future in futures:
        with pytest.raises(EngineUnavailable):
            future.result(60)
    with pytest.raises(EngineUnavailable, match="closed"):
        loop.submit(FakeJob("late", 1))


def test_an_urgent_job_parks_another_which_ends_with_the_same_result(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    low = loop.submit(FakeJob("low", 1000, value=7000), Terms(priority=9))
    wait_until(lambda: low.progress.current > 20)
    urgent = loop.submit(FakeJob("urgent", 10), Terms(priority=0))
    assert urgent.future.result(60).pixels == 10
    assert not low.future.done()
    assert low.future.result(60).pixels == 8000
    assert loop.stats.preemptions == 1
    assert loop.stats.steps == 1010, "no step was repeated"


def test_progress_only_grows_and_says_when_a_job_waits(make_loop):
    gate = threading.Event()  # no tick ends before both have been looked at
    loop = make_loop(FakeEngine(gate=gate, costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    first, second = loop.submit(FakeJob("first", 200), Terms(priority=9)), loop.submit(FakeJob("second", 40))
    seen: dict[str, list] = {"first": [], "second": []}
    while not (first.future.done() and second.future.done()):
        for submission in (first, second):
            if submission.progress not in seen[submission.job.task_id][-1:]:
                seen[submission.job.task_id].append(submission.progress)
        gate.set()
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
        second.future.result(60)
    assert first.future.result(60).pixels == 50
    assert third.future.result(60).pixels == 5


def test_limits_and_deadlines_end_a_job_with_the_reason(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    slow = loop.submit(FakeJob("slow", 100_000), Terms(soft_time_limit_s=2))
    wait_until(lambda: slow.started_at is not None)
    late = loop.submit(FakeJob("late", 5), Terms(expires_at=time.monotonic() + 0.1))
    for submission, reason in ((late, Overdue.EXPIRED), (slow, Overdue.SOFT_TIME_LIMIT)):
        with pytest.raises(JobOverdue) as raised:
            submission.future.result(60)
        assert raised.value.reason is reason


def test_the_next_tick_is_dispatched_before_the_running_one_ends_with_the_jobs_that_came_meanwhile(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(2, Cost(0.02))})
    loop = make_loop(engine, devices=2, slots=1)
    first = loop.submit(FakeJob("first", 40))
    wait_until(lambda: first.progress.current >= 4)
    second = loop.submit(FakeJob("second", 4))
    dispatched = engine.calls
    second.future.result(60)
    began = next(number for number, tick in enumerate(engine.ticks) if "second" in tick)
    assert began <= dispatched + 1, "in the next tick, or the one after it if that was on its way"
    first.future.result(60)
    assert sum(loop.stats.device_busy_s) > 0.9 * 44 * 0.02, "the devices never waited for the host"


def test_a_trace_shows_every_devices_work_and_the_hosts(make_loop, tmp_path):
    costs = {LANE: Cost(0.002, 0.001, 0.003)}
    trace = Trace(tmp_path / "trace.json", costs, 2)
    loop = make_loop(FakeEngine(), devices=2, slots=1, trace=trace)
    futures = [loop.submit(FakeJob(str(i), 10)).future for i in range(6)]
    for future in futures:
        future.result(60)
    with trace.span("encode", "0"):
        pass
    loop.close()
    events = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event]
    names = Counter(event["name"] for event in events if event["ph"] == "X")
    assert (names["insert"], names["decode"], names["encode"]) == (6, 6, 1)
    assert {event["tid"] for event in events if event["ph"] == "X" and event["pid"] == 1} == {0, 1}
    assert sum(event["args"]["steps"] for event in events if event["name"] == "advance") == 60
    assert any(event["ph"] == "C" and event["args"]["slots in use"] == 2 for event in events)


def test_a_trace_on_a_full_disk_is_switched_off_with_one_warning_and_the_jobs_go_on(make_loop, caplog):
    """The first write that failed ended the loop's thread."""
    trace = Trace(Path("/dev/full"), {LANE: Cost(0.02)}, 2)
    loop = make_loop(FakeEngine(), devices=2, slots=1, trace=trace)
    submissions = [loop.submit(FakeJob(str(i), 10, value=i)) for i in range(100)]
    assert [submission.future.result(60).pixels for submission in submissions] == [i + 10 for i in range(100)]
    with trace.span("encode", "0"):
        pass
    assert loop.alive
    loop.close()
    trace.close()
    assert caplog.text.count("No space left on device") == 1
    assert caplog.text.count("the trace is switched off") == 1


def test_a_disk_that_is_full_when_a_trace_ends_is_no_error(caplog):
    trace = Trace(Path("/dev/full"), {LANE: Cost(0.02)}, 2)
    trace.close()
    trace.close()
    with trace.span("encode", "0"):
        pass
    assert caplog.text.count("the end of the trace could not be written: [Errno 28] No space left on device") == 1


def test_a_job_handed_over_with_its_snapshot_resumes_where_it_was(make_loop):
    loop = make_loop(FakeEngine(), devices=1, slots=1)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    submission = loop.submit(FakeJob("moved", 12, value=100), snapshot=state)
    assert submission.progress.current == 5
    assert submission.future.result(60).pixels == 112
    assert loop.stats.steps == 7


def test_a_snapshot_of_another_configuration_is_dropped_and_the_job_starts_anew(make_loop, caplog):
    loop = make_loop(FakeEngine(), devices=1, slots=1)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7, fingerprint="another")
    submission = loop.submit(FakeJob("moved", 12, value=100), snapshot=state)
    assert submission.future.result(60).pixels == 112
    assert loop.stats.steps == 12
    assert "starts anew" in caplog.text


@pytest.mark.parametrize(("step", "steps_left"), [(-3, 15), (13, -1), (10**9, 12 - 10**9)])
def test_a_state_of_a_step_that_the_job_does_not_have_is_dropped(make_loop, caplog, step, steps_left):
    loop = make_loop(FakeEngine(), devices=1, slots=1)
    submission = loop.submit(FakeJob("forged", 12, value=100), snapshot=FakeSnapshot("forged", 105, step, steps_left))
    assert submission.progress.current == 0
    assert submission.future.result(60).pixels == 112
    assert "starts anew" in caplog.text


def test_a_parked_job_survives_a_failure_of_the_devices(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    low = loop.submit(FakeJob("low", 1000, value=7000), Terms(priority=9))
    wait_until(lambda: low.progress.current > 20)
    urgent = loop.submit(FakeJob("urgent", 1000), Terms(priority=0))
    wait_until(lambda: low.stage is JobStage.PARKED)
    engine.fail_late_at = (engine.calls,)
    assert urgent.future.result(60).pixels == 1000
    assert low.future.result(60).pixels == 8000
    assert (loop.stats.failures, loop.stats.retried) == (1, 1)


@pytest.mark.parametrize("poison", [{"5"}, {"2", "13"}, {"0", "1"}, {"15"}])
def test_a_job_that_breaks_programs_fails_alone_and_all_other_jobs_get_their_images(make_loop, poison):
    engine = FakeEngine(poison=frozenset(poison))
    loop = make_loop(engine, devices=8, slots=2)
    submissions = [loop.submit(FakeJob(str(i), 20 + i, value=1000 * i)) for i in range(16)]
    for i, submission in enumerate(submissions):
        if str(i) in poison:
            with pytest.raises(GenerationFailed, match=f"alone: RuntimeError: the fake device failed on {i}"):
                submission.future.result(60)
        else:
            assert submission.future.result(60).pixels == 1000 * i + 20 + i
    assert engine.recoveries == loop.stats.failures <= 1 + 5 * len(poison)
    assert loop.stats.images == 16 - len(poison)
    assert loop.submit(FakeJob("next", 5)).future.result(60).pixels == 5


@pytest.mark.parametrize("fault", [{"fail_at": (1,)}, {"fail_late_at": (1,)}, {"fail_late_at": (2,)}])
@pytest.mark.parametrize("jobs", [1, 2, 12])
def test_a_passing_failure_costs_no_job_its_image(make_loop, fault, jobs):
    loop = make_loop(FakeEngine(**fault), devices=2, slots=2)
    submissions = [loop.submit(FakeJob(str(i), 50, value=1000 * i)) for i in range(jobs)]
    assert [submission.future.result(60).pixels for submission in submissions] == [1000 * i + 50 for i in range(jobs)]
    assert loop.stats.failures >= 1
    assert loop.stats.retried >= min(jobs, 4)


def test_what_the_devices_had_done_before_a_dispatch_failed_is_delivered(make_loop):
    costs = {LANE: TickCosts(1, Cost(0.002))}
    engine = FakeEngine(costs=costs, fail_at=(1,))
    loop = DeviceLoop(engine, make_policy(1, 2, tick_s=0.2))
    short, long = loop.submit(FakeJob("short", 2)), loop.submit(FakeJob("long", 30))
    loop.start()
    assert (short.future.result(60).pixels, long.future.result(60).pixels) == (2, 30)
    assert loop.stats.failures == 1
    loop.close()


def test_a_job_whose_image_is_not_finite_is_tried_again_alone_and_disturbs_no_other_job(make_loop):
    engine = FakeEngine(nan=frozenset({"bad"}))
    loop = make_loop(engine, devices=2, slots=2)
    submissions = {name: loop.submit(FakeJob(name, 20)) for name in ("a", "bad", "b", "c")}
    with pytest.raises(GenerationFailed, match="NaN or infinite values"):
        submissions.pop("bad").future.result(60)
    assert {submission.future.result(60).pixels for submission in submissions.values()} == {20}
    assert loop.stats.failures == engine.recoveries == 0
    assert loop.stats.retried == 1
    assert engine.ticks[-1] == {"bad"}


def test_an_image_that_is_finite_the_second_time_ends_its_job(make_loop):
    class Passing(FakeEngine):
        def execute(self, plan, jobs, snapshots=None):
            tick = super().execute(plan, jobs, snapshots)
            self.nan -= {task_id for *_, task_id in plan.decoded()}
            return tick

    loop = make_loop(Passing(nan=frozenset({"once"})))
    state = FakeSnapshot("once", value=105, step=5, steps_left=7)
    assert loop.submit(FakeJob("once", 12, value=100), snapshot=state).future.result(60).pixels == 112
    wait_until(lambda: loop.stats.job_steps == 7 + 12)  # from the start: the values may have been in the state


def test_lost_devices_hand_every_job_over_and_end_the_loop(make_loop):
    died, gate = threading.Event(), threading.Event()
    loop = make_loop(FakeEngine(fatal_at=(1,), gate=gate), devices=1, slots=1, on_death=died.set)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    futures = [loop.submit(FakeJob(str(i), 50)).future for i in range(3)]
    moved = loop.submit(FakeJob("moved", 12, value=100), snapshot=state).future
    assert loop.alive
    gate.set()
    for future, snapshot in zip([*futures, moved], [None] * 3 + [state], strict=True):
        with pytest.raises(JobHandedOver) as raised:
            future.result(60)
        assert raised.value.snapshot == snapshot
    suspects = [future for future in [*futures, moved] if future.exception().suspect]
    assert suspects == futures[:1], "who was on the devices when they were lost"
    assert died.wait(60)
    wait_until(lambda: not loop.alive)
    with pytest.raises(JobHandedOver) as raised:
        loop.submit(FakeJob("late", 1)).future.result(60)
    assert not raised.value.suspect
    assert loop.stats.handed_over == 5


def test_devices_that_do_not_recover_hand_every_job_over_and_end_the_loop(make_loop):
    died, engine = threading.Event(), FakeEngine(fail_late_at=(1,))
    engine.is_lost = True
    loop = make_loop(engine, devices=1, slots=1, on_death=died.set)
    futures = [loop.submit(FakeJob(str(i), 50)).future for i in range(3)]
    for future in futures:
        with pytest.raises(JobHandedOver):
            future.result(60)
    assert died.wait(60)
    assert engine.recoveries == 1


def test_a_job_that_must_be_alone_shares_no_tick_and_waits_for_no_other_job(make_loop):
    announced: list[tuple[list[str], bool]] = []
    engine = FakeEngine(costs={LANE: TickCosts(2, Cost(0.002))})
    loop = make_loop(engine, devices=2, slots=2, on_start=lambda ids, alone: announced.append((sorted(ids), alone)))
    first = [loop.submit(FakeJob(f"first {i}", 900 + i)) for i in range(4)]
    wait_until(lambda: all(submission.started_at for submission in first))
    alone = loop.submit(FakeJob("alone", 60, value=500), alone=True)
    later = [loop.submit(FakeJob(f"later {i}", 10), Terms(priority=0)) for i in range(4)]
    assert alone.future.result(60).pixels == 560
    assert not any(submission.future.done() for submission in (*first, *later))
    for submission in (*first, *later):
        submission.future.result(60)
    assert all(tick == {"alone"} for tick in engine.ticks if "alone" in tick)
    assert [submission.future.result().pixels for submission in first] == [900, 901, 902, 903], "no step is lost"
    assert min(submission.started_at for submission in later) >= alone.future.result().finished_at - 0.05
    told = Counter(task_id for task_ids, _ in announced for task_id in task_ids)
    assert told == {"alone": 1, **{f"first {i}": 2 for i in range(4)}, **{f"later {i}": 1 for i in range(4)}}
    assert [task_ids for task_ids, was_alone in announced if was_alone] == [["alone"]]


def test_suspects_that_keep_coming_leave_the_others_their_half_of_the_devices(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=2)
    good = [loop.submit(FakeJob(f"good {i}", 100)) for i in range(4)]
    bad = [loop.submit(FakeJob(f"bad {i}", 100), alone=True) for i in range(20)]
    done: list[int] = []  # how many of theirs, at the end of each of the others
    for submission in good:
        submission.future.add_done_callback(lambda _: done.append(sum(each.future.done() for each in bad)))
    assert [submission.future.result(60).pixels for submission in good] == [100] * 4
    wait_until(lambda: len(done) == 4)
    assert max(done) <= 4, "two batches of theirs, two of the others"
    for submission in bad:
        loop.cancel(submission.job.task_id)


def test_a_job_that_must_be_alone_and_fails_has_no_other_try(make_loop):
    engine = FakeEngine(poison=frozenset({"alone"}))
    loop = make_loop(engine)
    with pytest.raises(GenerationFailed, match="the fake device failed on alone"):
        loop.submit(FakeJob("alone", 10), alone=True).future.result(60)
    assert loop.stats.failures == 1


def test_jobs_that_wait_in_quarantine_can_be_cancelled_revoked_and_expire(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    running = loop.submit(FakeJob("running", 1500), alone=True)
    wait_until(lambda: running.started_at is not None)
    wanted = threading.Event()
    wanted.set()
    cancelled = loop.submit(FakeJob("cancelled", 5), alone=True)
    revoked = loop.submit(FakeJob("revoked", 5), alone=True, may_start=wanted.is_set)
    expiring = loop.submit(FakeJob("expiring", 5), Terms(expires_at=time.monotonic() + 0.05), alone=True)
    limited = loop.submit(FakeJob("limited", 5000), Terms(time_limit_s=0.1), alone=True)
    last = loop.submit(FakeJob("last", 5))
    loop.cancel("cancelled")
    wanted.clear()
    for submission, error in ((cancelled, JobCancelled), (revoked, JobCancelled), (expiring, JobOverdue)):
        assert isinstance(submission.future.exception(60), error)
    assert not running.future.done()
    with pytest.raises(JobOverdue) as raised:
        limited.future.result(60)
    assert raised.value.reason is Overdue.TIME_LIMIT
    assert (running.future.result(60).pixels, last.future.result(60).pixels) == (1500, 5)


def test_a_job_that_gets_its_first_slot_is_announced_once_and_a_listener_that_fails_harms_no_job(make_loop, caplog):
    announced: list[str] = []

    def on_start(task_ids, alone) -> None:
        assert not alone
        announced.extend(task_ids)
        raise ConnectionError("nobody listens")

    engine = FakeEngine(fail_late_at=(1,))
    loop = make_loop(engine, devices=2, slots=1, on_start=on_start)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    futures = [loop.submit(FakeJob(str(i), 30)).future for i in range(5)]
    moved = loop.submit(FakeJob("moved", 12, value=100), snapshot=state).future
    assert [future.result(60).pixels for future in (*futures, moved)] == [30] * 5 + [112]
    assert sorted(announced) == ["0", "1", "2", "3", "4", "moved"]
    assert loop.stats.failures == 1
    assert "nobody listens" in caplog.text


def test_the_numbers_are_logged_once_as_json_when_the_loop_closes(make_loop, caplog):
    caplog.set_level("INFO", "sdtpu_worker.device_loop.loop")
    loop = make_loop(FakeEngine())
    loop.submit(FakeJob("a", 7)).future.result(60)
    wait_until(lambda: loop.stats.job_steps == 7)
    loop.close()
    loop.close()
    (record,) = [record for record in caplog.records if "closed" in record.getMessage()]
    stats = json.loads(record.getMessage().partition(": ")[2])
    assert (stats["images"], stats["job_steps"], stats["failures"], stats["retried"]) == (1, 7, 0, 0)


def test_devices_that_are_late_are_seen_as_stalled(make_loop):
    gate = threading.Event()
    loop = make_loop(FakeEngine(gate=gate), devices=1, slots=1)
    assert loop.stalled_s == 0.0
    future = loop.submit(FakeJob("a", 4)).future
    wait_until(lambda: loop.stalled_s > 0.1)
    assert loop.alive
    gate.set()
    future.result(60)
    wait_until(lambda: loop.stalled_s == 0.0)
    loop.close()
    assert not loop.alive


def test_a_dispatch_that_hangs_is_seen_as_stalled_too(make_loop):
    gate = threading.Event()

    class Hanging(FakeEngine):
        def execute(self, plan, jobs, snapshots=None):
            gate.wait(60)
            return super().execute(plan, jobs, snapshots)

    loop = make_loop(Hanging())
    future = loop.submit(FakeJob("a", 4)).future
    wait_until(lambda: loop.stalled_s > 0.1)
    gate.set()
    assert future.result(60).pixels == 4


def go_on_elsewhere(make_loop, ends: dict[FakeJob, JobHandedOver], **options) -> int:
    """Finish what was handed over in another loop, check the values, return the steps that it took."""
    loop = make_loop(FakeEngine(), **options)
    submissions = {job: loop.submit(job, snapshot=end.snapshot) for job, end in ends.items()}
    for job, submission in submissions.items():
        assert submission.future.result(60).pixels == job.value + job.num_steps
    return loop.stats.job_steps


@pytest.mark.parametrize("slots", [1, 3])
def test_draining_finishes_what_can_be_and_hands_over_the_rest_without_losing_a_step(make_loop, slots):
    costs = {LANE: TickCosts(2, Cost(0.002), {2: 1.0}, 0.0)}
    engine = FakeEngine(costs=costs)
    policy = Aggregator({LANE: TickCosts(2, Cost(0.002))}, slots, slots + 1, 0.05)
    loop = DeviceLoop(engine, policy)
    jobs = [FakeJob(str(i), 120 if i < slots else 5000, value=10_000 * i) for i in range(6 * slots)]
    submissions = [loop.submit(job) for job in jobs]
    loop.start()
    wait_until(lambda: sum(submission.started_at is not None for submission in submissions) == 2 * slots)
    started_at = time.monotonic()
    loop.drain(3)
    late = loop.submit(FakeJob("late", 1)).future
    with pytest.raises(JobHandedOver):
        late.result(2)
    waiting = [submission for submission in submissions if submission.started_at is None]
    for submission in waiting:
        assert isinstance(submission.future.exception(2), JobHandedOver), "they cannot be done in time"
    ends: dict[Any, Any] = {submission.job: submission.future.exception(60) for submission in submissions}
    assert 2.7 < time.monotonic() - started_at < 8, "the time that they were given, not that of their steps"
    handed_over = {job: end for job, end in ends.items() if end is not None}
    assert [job.task_id for job, end in ends.items() if end is None] == [str(i) for i in range(slots)]
    assert sum(end.snapshot is not None for end in handed_over.values()) >= slots
    assert loop.stats.handed_over == len(handed_over) + 1
    wait_until(lambda: not engine.slots)
    steps = loop.stats.job_steps + go_on_elsewhere(make_loop, handed_over)
    assert steps == sum(job.num_steps for job in jobs), "no step was lost or repeated"
    loop.close()


def test_draining_at_once_parks_every_running_job_and_a_later_call_only_shortens_the_time(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(2, Cost(0.002))})
    loop = make_loop(engine, devices=2, slots=2)
    jobs = [FakeJob(str(i), 5000, value=10_000 * i) for i in range(6)]
    submissions = [loop.submit(job) for job in jobs]
    wait_until(lambda: sum(submission.progress.current > 5 for submission in submissions) == 4)
    loop.drain(60)
    loop.drain(90)
    assert not submissions[0].future.done()
    loop.drain(0)
    ends = {job: submission.future.exception(60) for job, submission in zip(jobs, submissions, strict=True)}
    assert all(isinstance(end, JobHandedOver) for end in ends.values())
    assert [end.snapshot is not None for end in ends.values()] == [True] * 4 + [False] * 2
    steps = loop.stats.job_steps + go_on_elsewhere(make_loop, ends)
    assert steps == 6 * 5000
    assert loop.alive, "until it is closed"


def test_draining_hands_over_parked_and_quarantined_jobs_with_their_snapshots(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    low = loop.submit(FakeJob("low", 3000, value=7000), Terms(priority=9))
    wait_until(lambda: low.progress.current > 20)
    urgent = loop.submit(FakeJob("urgent", 5000, value=10_000), Terms(priority=0))
    wait_until(lambda: low.stage is JobStage.PARKED and urgent.progress.current > 20)
    alone = loop.submit(FakeJob("alone", 50), alone=True)
    loop.drain(0.05)
    ends = {submission.job: submission.future.exception(60) for submission in (low, urgent, alone)}
    assert [end.snapshot is None for end in ends.values()] == [False, False, True]
    assert loop.stats.job_steps + go_on_elsewhere(make_loop, ends) == 3000 + 5000 + 50


def test_time_without_a_job_does_not_count_as_active(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.001))}), devices=1, slots=1)
    began = time.monotonic()
    for i in range(3):
        time.sleep(0.3)
        loop.submit(FakeJob(str(i), 50)).future.result(60)
    assert 0.1 < loop.stats.active_s < time.monotonic() - began - 0.8


def test_a_job_that_comes_while_the_loop_drains_is_done_if_there_is_time_for_it(make_loop):
    loop = make_loop(FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))}), devices=1, slots=1)
    first = loop.submit(FakeJob("first", 50)).future
    loop.drain(3)
    short, long = loop.submit(FakeJob("short", 20)).future, loop.submit(FakeJob("long", 100_000)).future
    assert (first.result(60).pixels, short.result(60).pixels) == (50, 20)
    with pytest.raises(JobHandedOver):
        long.result(60)


def test_draining_an_idle_loop_hands_over_every_job_that_comes(make_loop):
    loop = make_loop(FakeEngine())
    loop.drain(0)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    with pytest.raises(JobHandedOver) as raised:
        loop.submit(FakeJob("moved", 12, value=100), snapshot=state).future.result(60)
    assert raised.value.snapshot == state


def test_a_failure_while_it_drains_hands_over_what_cannot_be_tried_again_in_time(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    submission = loop.submit(FakeJob("a", 3000))
    wait_until(lambda: submission.progress.current > 20)
    loop.drain(2)
    engine.fail_late_at = (engine.calls,)
    with pytest.raises(JobHandedOver) as raised:
        submission.future.result(60)
    assert raised.value.snapshot is None


@pytest.mark.parametrize("where", ["work", "dispatch"])
def test_devices_that_hang_do_not_keep_the_jobs_of_a_loop_that_drains(make_loop, where):
    gate = threading.Event()

    class Hanging(FakeEngine):
        def execute(self, plan, jobs, snapshots=None):
            if where == "dispatch":
                gate.wait(30)
            return super().execute(plan, jobs, snapshots)

    loop = make_loop(Hanging(gate=gate), devices=1, slots=1, patience_s=0.2)
    state = FakeSnapshot("moved", value=105, step=5, steps_left=7)
    moved = loop.submit(FakeJob("moved", 12, value=100), snapshot=state)
    futures = [loop.submit(FakeJob(str(i), 50)).future for i in range(3)]
    wait_until(lambda: moved.started_at is not None)
    started_at = time.monotonic()
    loop.drain(0.1)
    for future in (moved.future, *futures):
        with pytest.raises(JobHandedOver):
            future.result(60)
    assert moved.future.exception().snapshot == state, "what was on the host is not lost"
    assert moved.future.exception().suspect
    assert not futures[-1].exception().suspect, "it had no slot"
    assert 0.25 < time.monotonic() - started_at < 15
    with pytest.raises(JobHandedOver):
        loop.submit(FakeJob("late", 1)).future.result(60)
    wait_until(lambda: not loop.alive)
    started_at = time.monotonic()
    loop.close()
    assert time.monotonic() - started_at < 15, "a thread that hangs is not waited for"
    gate.set()


def test_draining_from_a_signal_handler_that_interrupts_a_submission_does_not_block(make_loop):
    loop = make_loop(FakeEngine())
    with loop._inbox.lock:  # where a handler may find its own thread
        loop.drain(0)
    with pytest.raises(JobHandedOver):
        loop.submit(FakeJob("a", 1)).future.result(60)


def test_a_job_goes_through_its_stages(make_loop):
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    low = loop.submit(FakeJob("low", 1000), Terms(priority=9))
    wait_until(lambda: low.stage is JobStage.RUNNING)
    second = loop.submit(FakeJob("second", 5), Terms(priority=9))
    assert second.stage is JobStage.WAITING
    stages, known = [], threading.Event()

    def may_start() -> bool:
        known.wait(60)
        stages.append((urgent.stage, urgent.started_at))
        return True

    urgent = loop.submit(FakeJob("urgent", 1000), Terms(priority=0), may_start)
    known.set()
    wait_until(lambda: low.stage is JobStage.PARKED)
    assert urgent.has_slot
    assert {stage for stage, _ in stages} == {JobStage.WAITING}
    engine.fail_late_at = (engine.calls,)
    wait_until(lambda: (JobStage.RETRYING, None) in stages)
    for submission in (low, second, urgent):
        submission.future.result(60)
        assert submission.stage is JobStage.ENDED
        assert not submission.has_slot


def test_a_loop_that_drains_goes_through_its_stages_and_never_back(make_loop):
    gate = threading.Event()
    engine = FakeEngine(costs={LANE: TickCosts(1, Cost(0.002))})
    loop = make_loop(engine, devices=1, slots=1)
    assert loop.stage is LoopStage.RUNNING
    future = loop.submit(FakeJob("a", 5000)).future
    wait_until(lambda: engine.calls > 2)
    loop.drain(60)
    assert loop.stage is LoopStage.DRAINING
    wait_until(lambda: loop.stats.ticks > 2)
    engine.gate = gate
    loop.drain(0)
    wait_until(lambda: loop.stage is LoopStage.PARKING)
    loop.drain(60)
    assert loop.stage is LoopStage.PARKING
    gate.set()
    assert isinstance(future.exception(60), JobHandedOver)
    for _ in range(2):
        loop.close()
        assert loop.stage is LoopStage.CLOSED
    loop.drain(1)
    assert loop.stage is LoopStage.CLOSED


def test_a_loop_that_has_given_up_stays_so_when_it_is_closed_and_hands_over_what_comes(make_loop):
    died = threading.Event()
    loop = make_loop(FakeEngine(fatal_at=(0,)), on_death=died.set)
    loop.submit(FakeJob("a", 5))
    assert died.wait(60)
    assert loop.stage is LoopStage.GIVEN_UP
    loop.close()
    assert loop.stage is LoopStage.GIVEN_UP
    assert isinstance(loop.submit(FakeJob("late", 5)).future.exception(60), JobHandedOver)


wishes = st.lists(
    st.tuples(
        st.sampled_from((LANE, (64, 128))),
        st.integers(1, 60),  # steps
        st.integers(0, 9),  # priority
        st.booleans(),  # an earlier one is cancelled
        st.sampled_from((math.inf, math.inf, math.inf, 0.0)),  # seconds until it expires
        st.sampled_from(("well", "well", "well", "well", "poison", "nan", "alone")),
    ),
    min_size=1,
    max_size=40,
)
faults = st.sets(st.integers(0, 12), max_size=3).map(tuple)
ends = st.sampled_from((None, None, 0.0, 0.01, 0.1))  # seconds of grace, when it drains


@settings(max_examples=100, deadline=None)
@given(wishes, st.integers(1, 4), st.integers(1, 3), faults, faults, ends)
def test_every_job_ends_once_with_its_own_result_whatever_comes_is_cancelled_or_fails(
    wishes, devices, slots, fail_at, fail_late_at, grace_s
):
    costs = {lane: TickCosts(devices, Cost(0.02, 0.005, 0.03)) for lane in (LANE, (64, 128))}
    poison, nan, alone = (
        frozenset(str(i) for i, wish in enumerate(wishes) if wish[-1] == kind) for kind in ("poison", "nan", "alone")
    )
    engine = FakeEngine(fail_at=fail_at, fail_late_at=fail_late_at, poison=poison, nan=nan)
    loop = DeviceLoop(engine, Aggregator(costs, slots, slots + 1, 0.1))
    loop.start()
    submissions, cancelled, ended = [], set(), Counter()
    for i, (lane, steps, priority, cancels, expires_s, kind) in enumerate(wishes):
        terms = Terms(priority, time.monotonic() + expires_s)
        submission = loop.submit(FakeJob(str(i), steps, lane, 1000 * i), terms, alone=kind == "alone")
        submission.future.add_done_callback(partial(lambda i, _: ended.update([i]), i))
        submissions.append(submission)
        if cancels:
            cancelled.add(str(i // 2))
            loop.cancel(str(i // 2))
    if grace_s is not None:
        loop.drain(grace_s)
    chances = len(fail_at) + len(fail_late_at)
    fails_by_chance = chances > 1 or (chances and poison)  # the second failure may hit who is alone for the first
    for i, (submission, (_, steps, _, _, expires_s, kind)) in enumerate(zip(submissions, wishes, strict=True)):
        error = submission.future.exception(60)
        if error is None:
            assert submission.future.result().pixels == 1000 * i + steps
            assert kind not in ("poison", "nan")
        elif isinstance(error, JobHandedOver):
            assert grace_s is not None
            if isinstance(error.snapshot, FakeSnapshot):
                assert error.snapshot.value == 1000 * i + error.snapshot.step
        elif isinstance(error, JobCancelled):
            assert str(i) in cancelled
        elif isinstance(error, JobOverdue):
            assert expires_s == 0.0
        else:
            assert isinstance(error, GenerationFailed)
            has_cause = kind in ("poison", "nan") or (kind == "alone" and (fail_at or fail_late_at))
            assert has_cause or fails_by_chance
    assert ended == Counter(range(len(wishes)))
    wait_until(lambda: loop.stats.images == sum(submission.future.exception() is None for submission in submissions))
    assert loop.stats.failures == engine.recoveries or grace_s is not None
    assert all(len(tick) == 1 for tick in engine.ticks if tick & alone)
    loop.close()
