"""The policy, driven to exhaustion without arrays, threads or clocks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.plan import Aggregator, DeviceInstruction, Outcome, Plan

LANES = ((64, 64), (64, 128))


def _number(task_id: str) -> int:
    return int(task_id) if task_id.isdigit() else 0


class Account:
    """Follows plans like an engine would and checks the invariant at each of them."""

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self.slots: dict[tuple, tuple[str, int]] = {}
        self.steps_left: dict[str, int] = {}
        self.ended: Counter[str] = Counter()
        self.started: list[str] = []

    def add(self, task_id: str, lane: tuple[int, int], steps: int) -> None:
        self.aggregator.add(task_id, lane, steps)
        self.steps_left[task_id] = steps

    def cancel(self, task_id: str) -> None:
        known = task_id in self.steps_left and not self.ended[task_id]
        assert self.aggregator.cancel(task_id) == known
        if known:
            self.ended[task_id] += 1
            self.slots = {place: job for place, job in self.slots.items() if job[0] != task_id}

    def tick(self) -> Plan | None:
        plan = self.aggregator.plan()
        if plan is None:
            return None
        self.started += sorted((device.insert[1] for device in plan.devices if device.insert), key=_number)
        for d, device in enumerate(plan.devices):
            if device.insert:
                slot, task_id = device.insert
                assert (plan.lane, d, slot) not in self.slots, "a slot holds at most one job"
                self.slots[plan.lane, d, slot] = task_id, self.steps_left[task_id]
        assert plan.occupied == sum(place[0] == plan.lane for place in self.slots)
        for d, device in enumerate(plan.devices):
            for place in [place for place in self.slots if place[:2] == (plan.lane, d)]:
                task_id, left = self.slots[place]
                assert device.steps <= max(left, 0) or left == 0, "no job is overrun while another could be decoded"
                self.slots[place] = task_id, max(0, left - device.steps)
            if device.decode:
                slot, task_id = device.decode
                assert self.slots.pop((plan.lane, d, slot)) == (task_id, 0), "only a finished job is decoded"
                self.ended[task_id] += 1
        return plan


arrivals = st.lists(
    st.tuples(st.sampled_from(LANES), st.integers(1, 40), st.integers(0, 3), st.booleans()), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 8), st.integers(1, 4), st.integers(1, 20))
def test_every_job_ends_exactly_once_whatever_arrives_and_is_cancelled(jobs, devices, slots, steps_per_tick):
    aggregator = Aggregator(LANES, devices, slots, tick_s=1.0)
    for lane in LANES:
        aggregator.observe_step(lane, 1.0 / steps_per_tick)
    account = Account(aggregator)
    for i, (lane, steps, ticks_before, cancelled) in enumerate(jobs):
        for _ in range(ticks_before):
            account.tick()
        account.add(str(i), lane, steps)
        if cancelled:
            account.cancel(str(i // 2))
    for _ in range(60 * 42 * len(jobs)):
        if account.tick() is None:
            break
    assert account.ended == Counter({str(i): 1 for i in range(len(jobs))})
    assert aggregator.counts() == {"waiting": 0, "running": 0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(1, 8), st.integers(1, 4))
def test_no_slot_stays_free_while_a_job_waits_past_a_tick_and_jobs_start_in_order(steps, devices, slots):
    account = Account(Aggregator(LANES[:1], devices, slots, tick_s=1.0))
    account.aggregator.observe_step(LANES[0], 0.2)
    for i, count in enumerate(steps):
        account.add(str(i), LANES[0], count)
    while True:
        free = [sum((LANES[0], d, s) not in account.slots for s in range(slots)) for d in range(devices)]
        waiting = account.aggregator.counts()["waiting"]
        plan = account.tick()
        if plan is None:
            break
        inserted = sum(device.insert is not None for device in plan.devices)
        assert inserted == min(waiting, sum(1 for count in free if count))
    assert account.started == sorted(account.started, key=int)


def test_a_lone_job_starts_in_the_first_plan_and_is_decoded_in_the_tick_of_its_last_step():
    aggregator = Aggregator(LANES[:1], 2, 1, tick_s=1.0)
    aggregator.observe_step(LANES[0], 0.25)
    aggregator.add("a", LANES[0], 6)
    assert aggregator.plan() == Plan(LANES[0], (DeviceInstruction((0, "a"), 4), DeviceInstruction()), 1)
    assert aggregator.plan() == Plan(LANES[0], (DeviceInstruction(None, 2, (0, "a")), DeviceInstruction()), 1)
    assert aggregator.plan() is None


def test_equal_jobs_keep_every_device_full_until_fewer_jobs_than_devices_are_left():
    account = Account(Aggregator(LANES[:1], 8, 1, tick_s=1.0))
    account.aggregator.observe_step(LANES[0], 0.1)
    for i in range(64):
        account.add(str(i), LANES[0], 30)
    while plan := account.tick():
        left = 64 - sum(account.ended.values()) + sum(device.decode is not None for device in plan.devices)
        assert plan.occupied == min(8, left)


def test_lanes_with_work_take_turns():
    account = Account(Aggregator(LANES, 1, 1, tick_s=1.0))
    for lane in LANES:
        account.aggregator.observe_step(lane, 1.0)
        account.add(str(lane), lane, 4)
    assert [account.tick().lane for _ in range(6)] == [*LANES] * 3


def test_a_tick_follows_the_measured_cost_of_a_step():
    aggregator = Aggregator(LANES[:1], 1, 1, tick_s=0.1)
    aggregator.observe_step(LANES[0], 0.01)
    assert aggregator.steps_per_tick(LANES[0]) == 10
    plan = Plan(LANES[0], (DeviceInstruction(steps=10),), 1)
    for _ in range(40):
        aggregator.update(Outcome(plan, elapsed_s=0.5))
    assert aggregator.steps_per_tick(LANES[0]) == 2


def test_an_id_that_is_already_here_is_refused():
    aggregator = Aggregator(LANES, 1, 1, tick_s=0.1)
    aggregator.add("a", LANES[0], 3)
    with pytest.raises(ValueError, match="already here"):
        aggregator.add("a", LANES[1], 3)
