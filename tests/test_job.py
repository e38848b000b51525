"""What a device job makes of values that nobody checked before it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from celery.worker import state

from sdtpu_worker.job import DeviceJob


def make_job(soft=None, hard=None, **stamps) -> DeviceJob:
    request = SimpleNamespace(id="a-task", delivery_info={}, expires=None, stamps=stamps)
    return DeviceJob(request, soft, hard, None, lambda task_id: None)


@pytest.fixture
def revoked_stamps():
    yield state.revoked_stamps
    state.revoked_stamps.clear()


@pytest.mark.parametrize("limit", ["10", [], {}, True, -1, 0, math.nan, None])
def test_a_time_limit_that_is_none_does_not_reach_the_device_loop(limit):
    """Celery's control command `time_limit` takes any JSON value for it."""
    terms = make_job(limit, limit).terms()
    assert (terms.soft_time_limit_s, terms.time_limit_s) == (math.inf, math.inf)


def test_a_time_limit_counts():
    terms = make_job(1.5, 3).terms()
    assert (terms.soft_time_limit_s, terms.time_limit_s) == (1.5, 3)


def test_a_job_with_a_revoked_stamp_may_not_start_whatever_else_is_in_the_stamps(revoked_stamps):
    revoked_stamps.update(user=[[1], {"a": 1}, "mallory"], order=["7"])
    assert make_job(user="alice").may_start()
    assert make_job(user=[["alice"], {}], order=None, other=[[]]).may_start()
    assert not make_job(user="mallory").may_start()
    assert not make_job(user=["alice", "mallory"]).may_start()
    assert not make_job(user=[[1]]).may_start()
