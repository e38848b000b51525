"""What a device job makes of values that nobody checked before it, and of states that Celery cannot store."""

from __future__ import annotations

import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery, signals
from celery.worker import state
from celery.worker.request import Request

from sdtpu_worker.contract.queues import read_sent_at
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.worker.celery_request import DeviceRequest, current_job
from sdtpu_worker.worker.job import DeviceJob
from sdtpu_worker.worker.process_changes import watch_failures_outside_tasks
from sdtpu_worker.worker.result_patience import wait_for_results

SERVING: Any = SimpleNamespace()


def make_job(soft=None, hard=None, **stamps) -> DeviceJob:
    request = SimpleNamespace(id="a-task", delivery_info={}, expires=None, stamps=stamps, had_its_slot=False)
    return DeviceJob(request, SERVING, soft, hard)


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


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Give what the broker was told."""
    told: list[str] = []
    monkeypatch.setattr(Request, "acknowledge", lambda self: told.append("done"))
    monkeypatch.setattr(Request, "reject", lambda self, requeue: told.append("requeue"))
    return told


@pytest.fixture
def request_of_a_job():
    request = DeviceRequest.__new__(DeviceRequest)
    request._request_dict = {"id": "some-id"}
    request.id = "some-id"
    return request


def fail_outside(request: DeviceRequest, *errors: Exception) -> None:
    """Do what Celery does when it fails around a task, in the task's thread."""
    job = DeviceJob(request, SERVING)
    token = current_job.set(job)
    with watch_failures_outside_tasks():
        for error in errors:
            signals.task_internal_error.send(sender=None, task_id=request.id, request={}, exception=error)
    current_job.reset(token)


def test_a_job_whose_error_was_stored_is_acknowledged(request_of_a_job, told):
    fail_outside(request_of_a_job, ValueError("no such thing"))
    request_of_a_job.acknowledge()
    assert told == ["done"]


def test_a_job_of_which_nothing_could_be_stored_is_not_acknowledged(request_of_a_job, told, caplog):
    fail_outside(request_of_a_job, *[redis.exceptions.OutOfMemoryError("maxmemory")] * 2)
    request_of_a_job.acknowledge()
    assert told == []
    assert "the state of task some-id could not be stored: OutOfMemoryError" in caplog.text


def test_a_job_that_a_stopping_worker_could_not_store_goes_back(request_of_a_job, told):
    fail_outside(request_of_a_job, *[EngineUnavailable("the worker stopped")] * 2)
    request_of_a_job.acknowledge()
    assert told == ["requeue"]


@pytest.mark.parametrize("task_id", ["some-id", "x"])
def test_an_error_around_a_task_that_is_no_job_of_the_pool_concerns_no_job(task_id, request_of_a_job, caplog):
    token = current_job.set(DeviceJob(request_of_a_job, SERVING) if task_id == "x" else None)
    with watch_failures_outside_tasks():
        signals.task_internal_error.send(sender=None, task_id=task_id, request=None, exception=ValueError())
    current_job.reset(token)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_thread_that_runs_jobs_waits_for_its_result_backend(monkeypatch):
    app = Celery("patient", broker="memory://", backend="redis://127.0.0.1:1", set_as_current=False)
    stopping = threading.Event()
    backend: Any = app.backend
    wait_for_results(backend, stopping.is_set)
    passing: list[Any] = [
        redis.ConnectionError("away"),
        redis.exceptions.OutOfMemoryError(),
        redis.exceptions.ReadOnlyError(),
    ]
    tries = iter([*passing, b"{}"])

    def answer(key: str) -> bytes:
        found = next(tries)
        if isinstance(found, Exception):
            raise found
        return found

    backend.client = SimpleNamespace(get=answer)
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _: None)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(backend.get, "some-key").result() == b"{}"
        stopping.set()
        tries = iter([redis.ConnectionError("away")] * 2)
        with pytest.raises(EngineUnavailable):
            thread.submit(backend.get, "some-key").result()
    app.close()


def test_the_main_thread_waits_for_no_result_backend_not_even_for_one_that_all_threads_share():
    """With `result_backend_thread_safe` it has the backend of the jobs, and would answer nobody while that is away."""
    app = Celery("shared", broker="memory://", backend="redis://127.0.0.1:1", set_as_current=False)
    app.conf.result_backend_thread_safe = True
    backend: Any = app.backend
    calls = []

    def answer(key: str) -> bytes:
        calls.append(key)
        raise redis.ConnectionError("away")

    backend.client = SimpleNamespace(get=answer)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: app.backend).result() is backend
        for _ in range(3):  # as many threads
            thread.submit(wait_for_results, backend, lambda: False).result()
    with pytest.raises(redis.ConnectionError):
        backend.get("some-key")
    assert len(calls) == 1
    app.close()


@pytest.mark.parametrize(
    ("header", "sent_at"),
    [(1.7e9, 1.7e9), (0, 0), (10**400, None), (-(10**400), None), (-1, None), (True, None), ("1", None), (None, None)],
)
def test_a_message_cannot_say_that_it_was_sent_at_no_time(header, sent_at):
    """A worker subtracts it from the time of day, which would overflow."""
    assert read_sent_at(header) == sent_at
