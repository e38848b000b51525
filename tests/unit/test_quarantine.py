"""How quarantine finds the job that breaks device programs by halving, without devices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtpu_worker.aggregator.jobs import EVERY_JOB, Eligibility
from sdtpu_worker.aggregator.quarantine import Quarantine


def group_of(quarantine: Quarantine) -> frozenset[str] | None:
    """Return the group that gets idle devices while no other job is there; None if every job may have a slot."""
    eligibility = quarantine.eligibility(devices_idle=True, now=0.0)
    return None if eligibility.excludes else eligibility.task_ids


def run_group(quarantine: Quarantine) -> list[str]:
    return sorted(group_of(quarantine), key=int)


def test_without_suspects_every_job_is_eligible():
    assert Quarantine().eligibility(devices_idle=True, now=0.0) == EVERY_JOB
    assert len(Quarantine()) == 0


def test_no_job_gets_a_slot_until_all_other_jobs_have_left_the_devices_to_the_group():
    quarantine = Quarantine()
    quarantine.add("a")
    assert quarantine.eligibility(devices_idle=False, now=0.0, other_jobs=True) == Eligibility.only(())
    assert not quarantine.is_alone("a")
    only_a = Eligibility.only("a")
    assert quarantine.eligibility(devices_idle=True, now=0.0, other_jobs=True) == only_a
    assert quarantine.eligibility(devices_idle=False, now=1.0, other_jobs=True) == only_a
    assert quarantine.is_alone("a")
    quarantine.discard("a")
    assert quarantine.eligibility(devices_idle=False, now=2.0, other_jobs=True) == EVERY_JOB


def test_after_a_group_the_other_jobs_have_as_much_time_and_no_suspect_is_among_them():
    quarantine = Quarantine()
    for task_id in "abc":
        quarantine.add(task_id)
    assert quarantine.eligibility(devices_idle=True, now=10.0, other_jobs=True) == Eligibility.only("a")
    quarantine.discard("a")
    for now in (13.0, 15.9):
        eligibility = quarantine.eligibility(devices_idle=True, now=now, other_jobs=True)
        assert eligibility == Eligibility.all_but("bc")
        assert "b" not in eligibility
        assert "x" in eligibility
    assert quarantine.eligibility(devices_idle=False, now=16.0, other_jobs=True) == Eligibility.only(()), (
        "they leave their slots"
    )
    assert quarantine.eligibility(devices_idle=True, now=16.5, other_jobs=True) == Eligibility.only("b")
    quarantine.discard("b")
    assert quarantine.eligibility(devices_idle=True, now=20.0, other_jobs=False) == Eligibility.only("c")


def test_suspects_are_halved_at_once_and_go_before_the_groups_that_wait():
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


def test_the_last_job_that_is_left_of_a_group_was_not_alone():
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
def test_exactly_the_jobs_at_fault_are_found_in_few_failures_and_all_other_jobs_run_once(count, data):
    jobs = [str(i) for i in range(count)]
    poison = set(data.draw(st.lists(st.sampled_from(jobs), max_size=4)))
    quarantine, found, done, failures = Quarantine(), [], [], 0
    quarantine.failed(jobs)
    while (group := group_of(quarantine)) is not None:
        assert group, "an empty group would wait for ever"
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
def test_discarding_a_job_twice_or_an_unknown_job_changes_nothing_else(task_id):
    quarantine = Quarantine()
    quarantine.failed(["0", "1"])
    quarantine.discard(task_id)
    quarantine.discard(task_id)
    assert len(quarantine) == (1 if task_id == "0" else 2)
