"""Who is at fault when a device program fails: halving, without devices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtpu_worker.aggregator.jobs import EVERYBODY, Admission
from sdtpu_worker.aggregator.quarantine import Quarantine


def group_of(quarantine: Quarantine) -> frozenset[str] | None:
    """Return who has idle devices for themselves, while nobody else is there; None for everybody."""
    admission = quarantine.admission(idle=True, now=0.0)
    return None if admission.others else admission.task_ids


def run_group(quarantine: Quarantine) -> list[str]:
    return sorted(group_of(quarantine), key=int)


def test_without_suspects_everybody_is_admitted():
    assert Quarantine().admission(idle=True, now=0.0) == EVERYBODY
    assert len(Quarantine()) == 0


def test_nobody_gets_a_slot_until_the_others_have_left_the_devices_to_the_group():
    quarantine = Quarantine()
    quarantine.add("a")
    assert quarantine.admission(idle=False, now=0.0, others=True) == Admission(others=False)
    assert not quarantine.is_alone("a")
    only_a = Admission(frozenset("a"), others=False)
    assert quarantine.admission(idle=True, now=0.0, others=True) == only_a
    assert quarantine.admission(idle=False, now=1.0, others=True) == only_a
    assert quarantine.is_alone("a")
    quarantine.discard("a")
    assert quarantine.admission(idle=False, now=2.0, others=True) == EVERYBODY


def test_after_a_group_the_others_have_as_much_time_and_no_suspect_is_among_them():
    quarantine = Quarantine()
    for task_id in "abc":
        quarantine.add(task_id)
    assert quarantine.admission(idle=True, now=10.0, others=True) == Admission(frozenset("a"), others=False)
    quarantine.discard("a")
    for now in (13.0, 15.9):
        admission = quarantine.admission(idle=True, now=now, others=True)
        assert admission == Admission(frozenset("bc"))
        assert "b" not in admission
        assert "x" in admission
    assert quarantine.admission(idle=False, now=16.0, others=True) == Admission(others=False), "they make room"
    assert quarantine.admission(idle=True, now=16.5, others=True) == Admission(frozenset("b"), others=False)
    quarantine.discard("b")
    assert quarantine.admission(idle=True, now=20.0, others=False) == Admission(frozenset("c"), others=False)


def test_suspects_are_halved_at_once_and_stay_before_those_who_wait():
    quarantine = Quarantine()
    quarantine.add("9")
    assert quarantine.failed(["0", "1", "2", "3", "4"]) is None
    groups = []
    while len(quarantine):
        groups.append(run_group(quarantine))
        for task_id in groups[-1]:
            quarantine.discard(task_id)
    assert groups == [["0", "1", "2"], ["3", "4"], ["9"]]


def test_a_lone_suspect_has_one_more_try_alone():
    quarantine = Quarantine()
    assert quarantine.failed(["0"]) is None
    assert run_group(quarantine) == ["0"]
    assert quarantine.failed(["0"]) == "0"
    assert group_of(quarantine) is None


def test_whoever_is_left_of_a_group_was_not_alone():
    quarantine = Quarantine()
    quarantine.failed(["0", "1", "2", "3"])
    assert run_group(quarantine) == ["0", "1"]
    quarantine.discard("0")
    assert not quarantine.is_alone("1")
    assert quarantine.failed(["1"]) is None
    assert run_group(quarantine) == ["1"]
    assert quarantine.failed(["1"]) == "1"


def test_a_member_that_had_no_slot_when_its_group_failed_is_in_a_group_of_its_own():
    quarantine = Quarantine()
    quarantine.failed(["0", "1", "2", "3", "4", "5"])
    assert run_group(quarantine) == ["0", "1", "2"]
    quarantine.failed(["0", "2"])
    assert [run_group(quarantine)] == [["0"]]
    quarantine.discard("0")
    assert run_group(quarantine) == ["2"]
    quarantine.discard("2")
    assert run_group(quarantine) == ["1"]


def test_a_failure_without_suspects_changes_nothing():
    quarantine = Quarantine()
    assert quarantine.failed([]) is None
    assert group_of(quarantine) is None


@given(st.integers(1, 64), st.data())
def test_exactly_those_at_fault_are_found_in_few_failures_and_the_others_run_once(count, data):
    jobs = [str(i) for i in range(count)]
    poison = set(data.draw(st.lists(st.sampled_from(jobs), max_size=4)))
    quarantine, found, done, failures = Quarantine(), [], [], 0
    quarantine.failed(jobs)
    while (group := group_of(quarantine)) is not None:
        assert group, "a group with nobody in it would wait for ever"
        suspects = sorted(group, key=int)
        if poison & group:
            failures += 1
            if (at_fault := quarantine.failed(suspects)) is not None:
                found.append(at_fault)
        else:
            for task_id in suspects:
                done.append(task_id)
                quarantine.discard(task_id)
    assert set(found) == poison
    assert sorted(found + done, key=int) == jobs
    assert failures <= len(poison) * (math.ceil(math.log2(count)) + 1)


@pytest.mark.parametrize("task_id", ["unknown", "0"])
def test_discarding_twice_or_somebody_else_is_no_mistake(task_id):
    quarantine = Quarantine()
    quarantine.failed(["0", "1"])
    quarantine.discard(task_id)
    quarantine.discard(task_id)
    assert len(quarantine) == (1 if task_id == "0" else 2)
