"""What becomes of a job's message when Celery cannot store what became of the job."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import redis
from celery import Celery, signals
from celery.worker.request import Request

from sdtpu_worker.config import read_config
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.job import DeviceJob, DeviceRequest
from sdtpu_worker.worker import DeviceWorker


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Give what the broker was told."""
    told: list[str] = []
    monkeypatch.setattr(Request, "acknowledge", lambda self: told.append("done"))
    monkeypatch.setattr(Request, "reject", lambda self, requeue: told.append("goes back"))
    return told


@pytest.fixture
def request_of_a_job():
    request = DeviceRequest.__new__(DeviceRequest)
    request._request_dict = {"id": "some-id"}
    request.id = "some-id"
    return request


def fail_outside(request: DeviceRequest, *errors: Exception) -> None:
    """Do what Celery does when it fails around a task, in the task's thread."""
    job = DeviceJob(request, None, None, None, lambda task_id: None)
    with job.in_this_thread():
        for error in errors:
            signals.task_internal_error.send(sender=None, task_id=request.id, exception=error)


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
    assert told == ["goes back"]


def test_errors_in_other_threads_concern_no_job():
    signals.task_internal_error.send(sender=None, task_id="other", exception=ValueError())


def test_a_thread_that_runs_jobs_waits_for_its_result_backend(monkeypatch):
    app = Celery("patient", broker="memory://", backend="redis://127.0.0.1:1", set_as_current=False)
    worker = DeviceWorker(app, "host", read_config(app.conf))
    worker.wait_for_results()
    passing = [redis.ConnectionError("away"), redis.exceptions.OutOfMemoryError(), redis.exceptions.ReadOnlyError()]
    tries = iter([*passing, b"{}"])

    def answer(key: str) -> bytes:
        found = next(tries)
        if isinstance(found, Exception):
            raise found
        return found

    app.backend.client = SimpleNamespace(get=answer)
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _: None)
    assert app.backend.get("some-key") == b"{}"
    worker.stopping.set()
    tries = iter([redis.ConnectionError("away")] * 2)
    with pytest.raises(EngineUnavailable):
        app.backend.get("some-key")
    app.close()
