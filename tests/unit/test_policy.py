"""The policy, driven to exhaustion without arrays, threads or clocks: time is a number that the tests move on."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import AGEING_S, EVERY_JOB, NO_LOAD, Eligibility, Load, Overdue, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Phase, Plan
from sdtpu_worker.aggregator.policy import Aggregator

LANES = ((64, 64), (64, 128))


def make_policy(devices=4, slots=1, *, lanes=LANES[:1], step_s=0.25, tick_s=1.0, phases=None, slowdown=None, **options):
    cost = Cost(step_s, insert_s=step_s / 4, decode_s=1.6 * step_s)
    costs = {lane: TickCosts(devices, cost, slowdown) for lane in lanes}
    return Aggregator(costs, slots, phases or slots + 1, tick_s, **options)


@pytest.mark.parametrize("steps_done", [-1, 11, 2**31])
def test_a_job_that_has_done_more_steps_than_it_has_is_not_accepted(steps_done):
    policy = make_policy()
    with pytest.raises(ValueError, match=rf"cannot have done {steps_done} of its 10 steps"):
        policy.add("it", LANES[0], 10, 0.0, steps_done=steps_done)
    assert policy.counts() == {"waiting": 0, "running": 0}


@dataclass
class Device:
    """Follows plans like an engine would, and checks the invariant at each of them."""

    policy: Aggregator
    now: float = 0.0
    slots: dict[tuple[Lane, int, int], str] = field(default_factory=dict)
    steps_left: dict[str, int] = field(default_factory=dict)
    parked: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)
    started: list[str] = field(default_factory=list)
    seconds: defaultdict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    excluded: set[int] = field(default_factory=set)

    def add(self, task_id: str, lane: Lane = LANES[0], steps: int = 10, **terms) -> None:
        self.policy.add(task_id, lane, steps, self.now, Terms(**terms))
        self.steps_left[task_id] = steps

    def cancel(self, task_id: str) -> None:
        known = task_id in self.steps_left and not self.ended[task_id]
        assert self.policy.cancel(task_id) == known
        if known:
            self._drop(task_id)

    def exclude(self, device: int) -> list[str]:
        """Lose a device; its jobs are lost with it."""
        held = {task_id for (_, d, _), task_id in self.slots.items() if d == device}
        dropped = self.policy.exclude(device)
        assert set(dropped) == {task_id for task_id in held if not self.ended[task_id]}
        self.excluded.add(device)
        for task_id in dropped:
            self._drop(task_id)
        return dropped

    def overdue(self) -> list[tuple[str, Overdue]]:
        gone = self.policy.overdue(self.now)
        for task_id, _ in gone:
            self._drop(task_id)
        return gone

    def tick(self) -> Plan | None:
        """Follow one plan and let its time pass."""
        plan = self.policy.plan(self.now)
        if plan is None:
            return None
        for places in (plan.parked, plan.resumed):
            assert len({place.device for place in places}) == len(places), "one on a device"
        for place in plan.parked:
            assert self.slots.pop((plan.lane, place.device, place.slot)) == place.task_id
            self.parked.add(place.task_id)
        for place in plan.resumed:
            self._seat(plan.lane, place.device, place.slot, place.task_id)
            self.parked.remove(place.task_id)
        occupied = {place for place in self.slots if place[0] == plan.lane}
        self.started += sorted(plan.inserted(), key=lambda task_id: (len(task_id), task_id))
        placed = {place.device for place in plan.resumed}
        placed |= {d for d, phases in enumerate(plan.devices) for phase in phases if phase.insert}
        assert not placed & self.excluded, "an excluded device gets no job"
        for device, phases in enumerate(plan.devices):
            assert not phases or device not in self.excluded, "nor anything else to do"
            assert len(phases) <= self.policy.phases_per_tick
            for phase in phases:
                assert phase.decode or phase.insert or phase.steps, "no empty phases"
                if phase.decode:
                    slot, task_id = phase.decode
                    assert self.slots.pop((plan.lane, device, slot)) == task_id
                    assert self.steps_left[task_id] == 0, "only a finished job is decoded"
                    self.ended[task_id] += 1
                if phase.insert:
                    slot, task_id = phase.insert
                    assert task_id not in self.parked, "a started job is never started again"
                    self._seat(plan.lane, device, slot, task_id)
                    occupied.add((plan.lane, device, slot))
                for held_at, task_id in self.slots.items():
                    if held_at[:2] == (plan.lane, device):
                        self.steps_left[task_id] = max(0, self.steps_left[task_id] - phase.steps)
        assert plan.occupied == len(occupied | {(plan.lane, p.device, p.slot) for p in plan.parked})
        self.now += self.policy.expected_s(plan)
        self.seconds[plan.lane] += self.policy.expected_s(plan)
        self.policy.update(Outcome(plan, self.policy.expected_s(plan)))
        return plan

    def run(self, most: int = 100_000) -> list[Plan]:
        plans = []
        while (plan := self.tick()) is not None:
            plans.append(plan)
            assert len(plans) < most, "the policy goes on for ever"
        return plans

    def _seat(self, lane: Lane, device: int, slot: int, task_id: str) -> None:
        assert (lane, device, slot) not in self.slots, "a slot holds at most one job"
        self.slots[lane, device, slot] = task_id

    def _drop(self, task_id: str) -> None:
        self.ended[task_id] += 1
        self.parked.discard(task_id)
        self.slots = {place: job for place, job in self.slots.items() if job != task_id}


jobs = st.lists(
    st.tuples(
        st.sampled_from(LANES),
        st.integers(1, 40),  # steps
        st.integers(0, 3),  # ticks before it comes
        st.integers(0, 9),  # priority
        st.sampled_from((math.inf, math.inf, 5.0, 1.0)),  # seconds until it expires
        st.sampled_from((math.inf, math.inf, 4.0)),  # time limit
        st.booleans(),  # an earlier one is cancelled
    ),
    min_size=1,
    max_size=50,
)
shapes = st.tuples(st.integers(1, 8), st.integers(1, 4))  # devices, slots per device
tick_seconds = st.sampled_from((0.1, 1.0, 3.0))
slowdowns = st.sampled_from((None, {8: 4.0}))


@settings(max_examples=200, deadline=None)
@given(jobs, shapes, tick_seconds, slowdowns, st.booleans())
def test_every_job_ends_exactly_once_whatever_comes_is_cancelled_expires_or_preempts(
    arrivals, shape, tick_s, slowdown, preemption
):
    device = Device(
        make_policy(*shape, lanes=LANES, tick_s=tick_s, slowdown=slowdown, phases=min(shape[1] + 1, 4),
                    preemption=preemption)
    )  # fmt: skip
    for i, (lane, steps, ticks_before, priority, expires_s, limit_s, cancels) in enumerate(arrivals):
        for _ in range(ticks_before):
            device.overdue()
            device.tick()
        device.add(str(i), lane, steps, priority=priority, expires_at=device.now + expires_s, time_limit_s=limit_s)
        if cancels:
            device.cancel(str(i // 2))
    for _ in range(100_000):
        device.overdue()
        if device.tick() is None:
            break
    assert device.ended == Counter({str(i): 1 for i in range(len(arrivals))})
    assert device.policy.counts() == {"waiting": 0, "running": 0}
    assert not device.slots
    assert not device.parked


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), shapes, tick_seconds, slowdowns)
def test_no_slot_stays_free_while_a_job_waits_past_a_tick_and_equals_start_in_order(steps, shape, tick_s, slowdown):
    device = Device(make_policy(*shape, tick_s=tick_s, slowdown=slowdown))
    for i, count in enumerate(steps):
        device.add(str(i), steps=count)
    while True:
        free = math.prod(shape) - len(device.slots)
        waiting = device.policy.counts()["waiting"]
        before = len(device.started)
        if device.tick() is None:
            break
        assert len(device.started) - before >= min(free, waiting)
    assert device.started == sorted(device.started, key=int)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=20, max_size=60), tick_seconds)
def test_all_devices_get_about_equal_work_in_a_tick_while_jobs_wait(steps, tick_s):
    device = Device(make_policy(8, 1, tick_s=tick_s))
    for i, count in enumerate(steps):
        device.add(str(i), steps=count)
    work, longest = 0.0, 0.0
    while device.policy.counts()["waiting"]:
        plan = device.tick()
        work += sum(plan.work_s) / 8
        longest += max(plan.work_s)
    assert longest == 0 or work / longest > 0.6


def test_a_lone_job_starts_in_the_first_plan_and_a_free_slot_makes_ticks_short():
    policy = make_policy(devices=2, tick_s=2.0)
    policy.add("a", LANES[0], 6, now=0.0)
    first, second = policy.plan(0.0), policy.plan(1.0)
    assert first.devices == ((Phase(insert=(0, "a"), steps=4),), ())
    assert (first.occupied, first.steps_done) == (1, {"a": 4})
    assert second.devices == ((Phase(steps=2), Phase(decode=(0, "a"))), ())
    assert policy.plan(2.0) is None


def test_a_device_decodes_inserts_and_goes_on_within_one_tick():
    policy = make_policy(devices=1, tick_s=1.0)
    policy.add("a", LANES[0], 3, now=0.0)
    policy.add("b", LANES[0], 9, now=0.0)
    (phases,) = policy.plan(0.0).devices
    assert phases == (Phase(insert=(0, "a"), steps=3), Phase(decode=(0, "a"), insert=(0, "b"), steps=3))


def test_a_tick_is_shorter_while_nobody_waits_and_longer_while_a_batch_does():
    steps = []
    for jobs in (4, 5, 8):
        policy = make_policy(devices=4, tick_s=2.0)
        for i in range(jobs):
            policy.add(str(i), LANES[0], 50, now=0.0)
        steps.append({phase.steps for phases in policy.plan(0.0).devices for phase in phases})
    assert steps == [{4}, {8}, {16}]


def test_a_tick_ends_with_the_next_decode():
    policy = make_policy(devices=2, tick_s=2.0)
    policy.add("a", LANES[0], 8, now=0.0)
    policy.add("b", LANES[0], 50, now=0.0)
    assert [phase.steps for (phase,) in policy.plan(0.0).devices] == [4, 4]
    assert policy.plan(1.0).devices == ((Phase(steps=4), Phase(decode=(0, "a"))), (Phase(steps=6),))


def test_equal_jobs_keep_every_slot_full_until_fewer_jobs_than_slots_are_left():
    device = Device(make_policy(devices=8))
    for i in range(64):
        device.add(str(i), steps=30)
    for plan in device.run():
        left = 64 - sum(device.ended.values())
        assert plan.occupied >= min(8, left)


def test_lanes_share_the_devices_seconds_fairly_even_if_a_step_of_one_costs_four_times_as_much():
    costs = {LANES[0]: TickCosts(1, Cost(0.1)), LANES[1]: TickCosts(1, Cost(0.4))}
    device = Device(Aggregator(costs, 1, 2, tick_s=0.2))
    for lane in LANES:
        for i in range(10):
            device.add(f"{lane}-{i}", lane, 50)
    while device.now < 30:
        device.tick()
    assert device.seconds[LANES[0]] == pytest.approx(15, abs=1.5)


def test_a_lane_that_was_idle_has_saved_nothing_up():
    device = Device(make_policy(1, lanes=LANES))
    device.add("a", LANES[0], 100)
    for _ in range(10):
        device.tick()
    device.add("b", LANES[1], 100)
    lanes = [device.tick().lane for _ in range(8)]
    assert abs(lanes.count(LANES[0]) - lanes.count(LANES[1])) <= 1


def test_the_order_is_priority_then_deadline_then_arrival():
    device = Device(make_policy(devices=1, preemption=False))
    jobs: dict[str, dict[str, Any]] = {
        "last": {"priority": 9},
        "second": {},
        "third": {},
        "first of its priority": {"expires_at": 500.0},
        "urgent": {"priority": 0},
    }
    for task_id, terms in jobs.items():
        device.add(task_id, steps=2, **terms)
    started = [task_id for plan in device.run() for task_id in plan.inserted()]
    assert started == ["urgent", "first of its priority", "second", "third", "last"]


def test_a_job_that_waits_goes_up_so_that_nothing_starves():
    device = Device(make_policy(devices=1, step_s=1.0))
    device.add("patient", steps=5, priority=9)
    i = 0
    while "patient" not in device.started:
        if device.policy.counts()["waiting"] < 4:
            device.add(f"urgent {i}", steps=5, priority=3)
            i += 1
        device.tick()
        assert device.now < 10 * AGEING_S
    assert device.now > 4 * AGEING_S, "and the urgent ones went first as long as it had not waited"


def test_a_higher_priority_takes_the_slot_of_the_lowest_which_resumes_without_repeating_a_step():
    device = Device(make_policy(devices=2))
    device.add("low", steps=40, priority=9)
    device.add("middle", steps=40, priority=6)
    device.tick()
    device.add("urgent", steps=4, priority=0)
    plan = device.tick()
    assert [place.task_id for place in plan.parked] == ["low"]
    assert plan.inserted() == ("urgent",)
    assert "low" not in plan.steps_done
    taken = 40 - device.steps_left["low"]
    plans = device.run()
    assert [place.task_id for plan in plans for place in plan.resumed] == ["low"]
    assert device.ended == Counter(low=1, middle=1, urgent=1)
    assert taken > 0
    assert device.started == ["low", "middle", "urgent"], "low went on where it was"


def test_equal_priorities_never_take_each_others_slots_nor_does_anyone_with_preemption_off():
    for preemption, priority in ((True, 6), (False, 0)):
        device = Device(make_policy(devices=1, preemption=preemption))
        device.add("first", steps=40)
        device.tick()
        device.add("second", steps=4, priority=priority)
        assert not any(plan.parked for plan in device.run())


def test_a_job_that_would_be_done_in_this_tick_keeps_its_slot():
    device = Device(make_policy(devices=1))
    device.add("low", steps=6, priority=9)
    device.tick()
    device.add("urgent", steps=4, priority=0)
    assert not any(plan.parked for plan in device.run())


def test_time_limits_count_from_the_slot_and_stand_still_while_parked():
    device = Device(make_policy(devices=1))
    device.add("first", steps=40, soft_time_limit_s=60.0)
    device.add("limited", steps=400, time_limit_s=5.0, soft_time_limit_s=9.0)
    device.add("soft", steps=400, time_limit_s=9.0, soft_time_limit_s=5.0)
    device.tick()
    device.now += 4
    assert device.overdue() == []
    while "limited" not in device.started:
        device.tick()
    device.now += 5
    assert device.overdue() == [("limited", Overdue.TIME_LIMIT)]
    while "soft" not in device.started:
        device.tick()
    device.add("urgent", steps=40, priority=0)
    device.tick()
    device.now += 20
    assert device.overdue() == []
    while device.parked:
        device.tick()
    device.now += 5
    assert device.overdue() == [("soft", Overdue.SOFT_TIME_LIMIT)]
    device.run()
    assert device.ended == Counter(first=1, limited=1, soft=1, urgent=1)


def test_a_job_expires_until_it_has_its_slot_and_not_afterwards():
    device = Device(make_policy(devices=1))
    device.add("running", steps=40, expires_at=1.0)
    device.add("waiting", steps=40, expires_at=1.0)
    device.tick()
    device.now = 2.0
    assert device.overdue() == [("waiting", Overdue.EXPIRED)]


def test_a_job_that_comes_with_a_state_is_resumed_and_takes_only_the_steps_that_are_left():
    policy = make_policy(devices=1)
    policy.add("handed over", LANES[0], 10, 0.0, None, steps_done=7)
    plan = policy.plan(0.0)
    assert [place.task_id for place in plan.resumed] == ["handed over"]
    assert plan.inserted() == ()
    assert plan.steps_done["handed over"] == 9
    assert [phase.steps for phase in plan.devices[0]] == [2]


def test_etas_follow_the_steps_that_are_left_and_the_queue():
    device = Device(make_policy(devices=2, step_s=0.1, tick_s=0.3))
    for task_id, steps in (("long", 50), ("short", 10), ("next", 10), ("after", 10)):
        device.add(task_id, steps=steps)
    device.tick()
    etas, asked_at = device.policy.etas_s(device.now), device.now
    assert etas["short"] < etas["next"] < etas["after"] < etas["long"]
    ends = {}
    while (plan := device.tick()) is not None:
        ends.update({task_id: device.now for *_, task_id in plan.decoded()})
    for task_id, eta_s in etas.items():
        assert eta_s == pytest.approx(ends[task_id] - asked_at, rel=0.35, abs=0.6)


def test_every_device_with_a_job_denoises_also_where_they_slow_each_other_down():
    for slowdown in (None, {2: 1.0, 4: 2.0, 8: 4.0}):
        policy = make_policy(devices=8, slowdown=slowdown)
        for i in range(8):
            policy.add(str(i), LANES[0], 40, now=0.0)
        for _ in range(3):
            assert all(any(phase.steps for phase in phases) for phases in policy.plan(0.0).devices)


def test_costs_follow_what_ticks_take():
    costs = TickCosts(2, Cost(0.1))
    alone, both = (Plan(LANES[0], phases) for phases in (((Phase(steps=10),), ()), ((Phase(steps=10),),) * 2))
    for _ in range(60):
        costs.learn(alone, 2.0)
        costs.learn(both, 3.0)
    assert costs.tick_s(alone) == pytest.approx(2.0, rel=0.05)
    assert costs.tick_s(both) == pytest.approx(3.0, rel=0.05)
    assert TickCosts.from_json(costs.to_json()).tick_s(both) == pytest.approx(3.0, rel=0.05)


def test_a_tick_lasts_as_long_as_its_busiest_device_and_shared_cores_are_free_for_it_when_the_others_are_done():
    plan = Plan(LANES[0], ((Phase(steps=10),), (Phase(steps=30),)))
    assert TickCosts(2, Cost(0.1)).tick_s(plan) == pytest.approx(3.0)
    assert TickCosts(2, Cost(0.1), {2: 2.0}, overhead_s=0.5).tick_s(plan) == pytest.approx(0.5 + 2 * 1.0 + 2.0)


def test_an_id_that_is_already_here_and_a_lane_that_is_not_are_refused():
    policy = make_policy(lanes=LANES[:1])
    policy.add("a", LANES[0], 3, now=0.0)
    with pytest.raises(ValueError, match="task a was added already"):
        policy.add("a", LANES[0], 3, now=0.0)
    with pytest.raises(KeyError):
        policy.add("b", LANES[1], 3, now=0.0)


def test_ten_thousand_mixed_jobs_in_fake_time_all_end_once_in_bounded_time():
    device = Device(make_policy(devices=8, step_s=0.03, tick_s=0.1))
    steps = (10, 20, 30, 50)
    for i in range(10_000):
        device.add(str(i), steps=steps[i * 7 % 4], priority=6 + i % 2)
        while device.policy.counts()["waiting"] >= 16:
            device.tick()
    device.run()
    assert device.ended == Counter({str(i): 1 for i in range(10_000)})
    ideal_s = sum(steps[i * 7 % 4] * 0.03 + 0.0075 + 0.048 for i in range(10_000)) / 8
    assert ideal_s / device.now > 0.9


def test_only_eligible_jobs_get_slots_and_the_other_jobs_keep_their_order():
    device = Device(make_policy(devices=2))
    device.add("running", steps=20)
    device.tick()
    for task_id, priority in (("second", 6), ("first", 3), ("suspect", 9)):
        device.add(task_id, steps=4, priority=priority)
    device.policy.set_eligible(Eligibility.only(()))
    device.run()
    device.policy.set_eligible(Eligibility.only(["suspect"]))
    device.run()
    assert device.started == ["running", "suspect"]
    assert device.policy.counts() == {"waiting": 3, "running": 0}
    device.policy.set_eligible(EVERY_JOB)
    device.run()
    assert [task_id for task_id in device.started if task_id in ("first", "second")] == ["first", "second"]
    assert device.ended == Counter(running=1, suspect=1, first=1, second=1)


@pytest.mark.parametrize("preemption", [True, False])
def test_jobs_that_are_not_eligible_leave_the_slots_within_a_tick_for_each_slot_of_a_device(preemption):
    device = Device(make_policy(devices=2, slots=3, lanes=LANES, preemption=preemption))
    for i in range(12):
        device.add(str(i), LANES[i % 2], steps=1000, priority=i)
    while device.policy.counts()["running"] < 12:
        device.tick()
    device.add("suspect", steps=2)
    device.policy.set_eligible(Eligibility.only(["0", "suspect"]))
    ticks = [device.tick() for _ in range(2 * 3)]
    assert {place.task_id for plan in ticks for place in plan.parked} == {str(i) for i in range(1, 12)}
    device.policy.set_eligible(EVERY_JOB)
    device.run()
    assert device.ended == {**{str(i): 1 for i in range(12)}, "suspect": 1}


def test_all_jobs_but_some_may_be_eligible_and_priorities_hold_among_them():
    device = Device(make_policy(devices=1))
    device.add("low", steps=40, priority=9)
    device.tick()
    device.add("suspect", steps=4, priority=0)
    device.add("urgent", steps=4, priority=3)
    device.policy.set_eligible(Eligibility.all_but(["suspect"]))
    device.run()
    assert device.started == ["low", "urgent"]
    assert device.ended == Counter(low=1, urgent=1)
    assert device.policy.counts() == {"waiting": 1, "running": 0}


def test_a_job_that_is_not_eligible_takes_no_jobs_slot_and_still_expires():
    device = Device(make_policy(devices=1))
    device.add("low", steps=40, priority=9)
    device.tick()
    device.add("urgent", steps=4, priority=0, expires_at=2.0)
    device.policy.set_eligible(Eligibility.only(["low"]))
    assert not device.tick().parked
    device.now = 2.0
    assert device.overdue() == [("urgent", Overdue.EXPIRED)]


@settings(max_examples=100, deadline=None)
@given(jobs, shapes, tick_seconds, slowdowns, st.floats(0, 4))
def test_no_tick_lasts_longer_than_it_may_and_nothing_is_planned_if_no_step_fits(
    arrivals, shape, tick_s, slowdown, most_s
):
    policy = make_policy(*shape, lanes=LANES, tick_s=tick_s, slowdown=slowdown)
    for i, (lane, steps, _, priority, *_) in enumerate(arrivals):
        policy.add(str(i), lane, steps, 0.0, Terms(priority=priority))
    taken: dict[str, int] = {}
    for _ in range(20):
        plan = policy.plan(0.0, most_s)
        if plan is None:
            break
        costs = policy._lanes[plan.lane].costs
        slack_s = costs.slowdown(8) * (costs.cost.insert_s + 0.25 * costs.cost.step_s)
        assert policy.expected_s(plan) <= most_s + slack_s, "but for an insert, which brings its job nearer to its end"
        assert all(steps >= taken.get(task_id, 0) for task_id, steps in plan.steps_done.items())
        taken.update(plan.steps_done)
    assert policy.plan(0.0, 0.0) is None
    assert policy.counts()["running"] == sum(len(places) for places in policy.places().values())


def test_a_plan_says_as_often_as_it_is_asked_what_it_inserts_and_decodes():
    phases = (Phase(insert=(1, "a"), steps=3), Phase(decode=(0, "b"), insert=(0, "c")))
    plan = Plan(LANES[0], ((), phases))
    inserted, decoded = plan.inserted(), plan.decoded()
    for _ in range(2):
        assert list(inserted) == ["a", "c"]
        assert [(image.device, image.phase, image.slot, image.task_id) for image in decoded] == [(1, 1, 0, "b")]


def test_places_say_where_every_running_job_is():
    device = Device(make_policy(devices=2, slots=2))
    for i in range(3):
        device.add(str(i), steps=40)
    device.tick()
    places = {(lane, p.device, p.slot): p.task_id for lane, of_lane in device.policy.places().items() for p in of_lane}
    assert places == device.slots


losses = st.lists(st.integers(0, 7), max_size=8)


@settings(max_examples=200, deadline=None)
@given(jobs, shapes, tick_seconds, slowdowns, losses)
def test_nothing_is_ever_planned_for_an_excluded_device_and_every_job_still_ends_once(
    arrivals, shape, tick_s, slowdown, losses
):
    device = Device(make_policy(*shape, lanes=LANES, tick_s=tick_s, slowdown=slowdown, phases=min(shape[1] + 1, 4)))
    for i, (lane, steps, ticks_before, priority, expires_s, limit_s, cancels) in enumerate(arrivals):
        for _ in range(ticks_before):
            device.overdue()
            device.tick()
        device.add(str(i), lane, steps, priority=priority, expires_at=device.now + expires_s, time_limit_s=limit_s)
        if cancels:
            device.cancel(str(i // 2))
        if losses and (lost := losses.pop() % shape[0]) not in device.excluded:
            if len(device.excluded) == shape[0] - 1:
                with pytest.raises(ValueError, match=f"device {lost} cannot be excluded: it is the last one"):
                    device.policy.exclude(lost)
            else:
                device.exclude(lost)
    for _ in range(100_000):
        device.overdue()
        if device.tick() is None:
            break
    assert device.ended == Counter({str(i): 1 for i in range(len(arrivals))})
    assert device.policy.counts() == {"waiting": 0, "running": 0}
    assert not device.slots


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), shapes, tick_seconds, st.sets(st.integers(0, 7)))
def test_no_slot_of_a_device_that_is_left_stays_free_while_a_job_waits(steps, shape, tick_s, losses):
    device = Device(make_policy(*shape, tick_s=tick_s))
    for lost in sorted(losses)[: shape[0] - 1]:
        if lost < shape[0]:
            device.exclude(lost)
    for i, count in enumerate(steps):
        device.add(str(i), steps=count)
    while True:
        free = (shape[0] - len(device.excluded)) * shape[1] - len(device.slots)
        waiting, before = device.policy.counts()["waiting"], len(device.started)
        if device.tick() is None:
            break
        assert len(device.started) - before >= min(free, waiting)
    assert device.started == sorted(device.started, key=int)


def test_a_full_batch_of_the_devices_that_are_left_lets_an_urgent_job_in():
    device = Device(make_policy(devices=2))
    device.exclude(1)
    device.add("low", steps=40, priority=9)
    device.tick()
    device.add("urgent", steps=4, priority=0)
    plan = device.tick()
    assert [place.task_id for place in plan.parked] == ["low"]
    assert plan.inserted() == ("urgent",)
    assert device.policy.etas_s(device.now)["low"] > 0
    device.run()
    assert device.ended == Counter(low=1, urgent=1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.booleans())
def test_a_job_with_devices_to_avoid_gets_another_one_if_there_is_one(devices, slots, avoid, losses, is_parked):
    device = Device(make_policy(devices, slots))
    for lost in sorted(losses & set(range(devices)))[: devices - 1]:
        device.exclude(lost)
    device.policy.add("it", LANES[0], 10, 0.0, steps_done=3 if is_parked else 0)
    device.steps_left["it"] = 7 if is_parked else 10
    device.parked |= {"it"} if is_parked else set()
    device.policy.set_eligible(Eligibility.only(["it"], avoid))
    (where,) = set(device.tick().placed().values())
    left = set(range(devices)) - device.excluded
    assert where in (left - avoid or left)
    device.run()
    assert device.ended == Counter(it=1)


def test_pictures_and_controlnets_cost_their_own_device_more_and_the_plan_knows():
    cost = Cost(1.0, insert_s=2.0, decode_s=1.0, picture_s=4.0, control_s=(0.5, 3.0))
    policy = Aggregator({LANES[0]: TickCosts(2, cost)}, slots_per_device=1, phases_per_tick=2, tick_s=32.0)
    policy.add("plain", LANES[0], 20, 0.0)
    policy.add("rich", LANES[0], 20, 0.0, load=Load(pictures=1, controls=frozenset({1})))
    etas = policy.etas_s(0.0)
    assert etas == {"plain": 2 + 20 + 1, "rich": 2 + 4 + 20 * 4 + 1}
    plan = policy.plan(0.0)
    by_task = {phase.insert[1]: phase for phases in plan.devices for phase in phases if phase.insert}
    assert (by_task["rich"].pictures, by_task["rich"].controls) == (1, {1})
    assert (by_task["plain"].pictures, by_task["plain"].controls) == (0, frozenset())
    assert by_task["plain"].steps > 2 * by_task["rich"].steps
    assert plan.work_s == tuple(cost.of(phases) for phases in plan.devices)


def test_costs_with_pictures_survive_json():
    costs = TickCosts(2, Cost(1.0, 2.0, 1.0, 4.0, (0.5, 3.0)), {2: 1.5}, 0.1)
    assert TickCosts.from_json(json.loads(json.dumps(costs.to_json()))).to_json() == costs.to_json()


def test_long_prompts_cost_their_own_device_more_and_the_plan_knows():
    cost = Cost(1.0, insert_s=2.0, decode_s=1.0, window_s=0.5, window_insert_s=1.0)
    policy = Aggregator({LANES[0]: TickCosts(2, cost)}, slots_per_device=1, phases_per_tick=2, tick_s=32.0)
    policy.add("plain", LANES[0], 20, 0.0)
    policy.add("long", LANES[0], 20, 0.0, load=Load(windows=2))
    assert policy.etas_s(0.0) == {"plain": 2 + 20 + 1, "long": 2 + 2 + 20 * 2 + 1}
    plan = policy.plan(0.0)
    by_task = {phase.insert[1]: phase for phases in plan.devices for phase in phases if phase.insert}
    assert (by_task["long"].windows, by_task["long"].windows_in) == (2, 2)
    assert (by_task["plain"].windows, by_task["plain"].windows_in) == (0, 0)
    assert by_task["plain"].steps > by_task["long"].steps
    assert plan.work_s == tuple(cost.of(phases) for phases in plan.devices)


@pytest.mark.parametrize("load", [Load(windows=2), Load(controls=frozenset({0}))])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_job_whose_step_takes_longer_than_a_tick_goes_on_all_the_same(load, slots):
    cost = Cost(1.0, insert_s=0.1, decode_s=0.5, control_s=(0.8,), window_s=0.4)
    device = Device(Aggregator({LANES[0]: TickCosts(2, cost)}, slots, slots + 1, tick_s=0.1))
    jobs = {f"{kind} {i}": each for i in range(4) for kind, each in (("plain", NO_LOAD), ("slow", load))}
    for task_id, each in jobs.items():
        device.policy.add(task_id, LANES[0], 6, 0.0, load=each)
        device.steps_left[task_id] = 6
    for _ in range(200):
        device.tick()
    assert device.ended == Counter(dict.fromkeys(jobs, 1))


def test_the_jobs_of_a_device_have_their_previews_in_turn():
    policy = make_policy(devices=1, slots=3, tick_s=1.0, preview_every=1)
    for name in "abc":
        policy.add(name, LANES[0], 60, now=0.0)
    previews = [place.task_id for tick in range(12) for place in policy.plan(float(tick)).previews]
    assert len(previews) == 12
    assert set(Counter(previews).values()) == {4}
