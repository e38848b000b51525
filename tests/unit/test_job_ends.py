"""How a job ends for everybody who listens to Celery: its signals, its events and its result backend."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import signals

from sdtpu_worker import StorageError
from tests.support.in_process import InProcessWorker, backend_app, in_process_worker

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def worker() -> Iterator[InProcessWorker]:
    with backend_app("cache+memory://") as app, in_process_worker(app, step_s=0.005) as worker:
        yield worker


@pytest.fixture(autouse=True)
def postruns() -> Iterator[list[Any]]:
    """Store what celery-progress stores when it hears that a task has ended; give the states that were heard."""
    states: list[Any] = []

    def receiver(state: Any = None, task: Any = None, retval: Any = None, **_: Any) -> None:
        states.append(state)
        if state == "IGNORED":
            task.update_state(state="IGNORED", meta=str(retval))

    signals.task_postrun.connect(receiver, weak=False)
    yield states
    signals.task_postrun.disconnect(receiver)


def terminate(worker: InProcessWorker, request: Any) -> None:
    """Do what the main thread does with `revoke(terminate=True)`."""
    request.terminate(worker.pool, "TERM")


def test_a_job_that_ends_with_its_image_ends_as_any_task(worker, postruns):
    request = worker.take()
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["result"]["task_id"] == request.id
    assert postruns == ["SUCCESS"]
    assert worker.events.of(request.id) == ["task-started", "task-succeeded"]


def test_a_terminated_job_is_revoked_for_every_listener(worker, postruns):
    request = worker.take(steps=1000)
    worker.wait_for_slot(request)
    terminate(worker, request)
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["status"] == "REVOKED"
    assert postruns == [None], "the state that a listener gets of any task that Celery kills"
    assert worker.events.of(request.id)[-1] == "task-revoked"


def test_a_job_over_its_hard_time_limit_fails_for_every_listener(worker, postruns):
    failures: list[Any] = []
    signals.task_failure.connect(lambda exception, **_: failures.append(type(exception).__name__), weak=False)
    request = worker.take(steps=1000, time_limit=0.05)
    assert worker.wait_for_end(request) == "done"
    meta = worker.meta(request)
    assert (meta["status"], type(meta["result"]).__name__) == ("FAILURE", "TimeLimitExceeded")
    assert failures == ["TimeLimitExceeded"]
    assert postruns == [None]
    assert worker.events.of(request.id)[-1] == "task-failed"


def test_a_job_over_its_soft_time_limit_fails_for_every_listener(worker, postruns):
    request = worker.take(steps=1000, soft_time_limit=0.05)
    assert worker.wait_for_end(request) == "done"
    assert type(worker.meta(request)["result"]).__name__ == "SoftTimeLimitExceeded"
    assert postruns == ["FAILURE"]


def test_a_job_on_its_way_to_another_worker_is_complete_for_nobody(worker, postruns):
    request = worker.take(steps=1000)
    worker.wait_for_slot(request)
    worker.pool.hand_over()
    assert worker.wait_for_end(request) == "requeued"
    assert worker.broker.snapshots[request.id]
    assert worker.meta(request)["status"] in ("STARTED", "PROGRESS")
    assert postruns == [None]
    assert {"task-succeeded", "task-failed", "task-revoked"}.isdisjoint(worker.events.of(request.id))


def test_a_job_that_expires_while_it_waits_is_revoked_for_every_listener(worker, postruns):
    ahead = [worker.take(steps=1000) for _ in range(2)]
    worker.wait_for_slot(ahead[1])
    request = worker.take(expires=0.2)
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["status"] == "REVOKED"
    assert set(postruns) <= {None}
    assert worker.events.of(request.id)[-1] == "task-revoked"


@pytest.mark.parametrize(("end", "event"), [("SUCCESS", "task-succeeded"), ("FAILURE", "task-failed")])
def test_a_redelivered_job_that_is_done_keeps_its_end_and_no_task_begins_again(worker, postruns, end, event):
    task_id = uuid.uuid4().hex
    stored: dict[str, Any] = {"SUCCESS": {"image": "kept"}, "FAILURE": ValueError("kept")}
    worker.app.backend.store_result(task_id, stored[end], end)
    request = worker.take(task_id, redelivered=True)
    assert worker.wait_for_end(request) == "done"
    meta = worker.meta(request)
    assert (meta["status"], "kept" in str(meta["result"])) == (end, True)
    assert not worker.images.data
    assert postruns == []
    assert worker.events.of(task_id) == [event]


def test_failures_that_an_operator_must_see_are_errors_and_a_clients_mistakes_are_not(worker, caplog):
    """Sentry, too, hides what a task's `throws` names."""
    caplog.set_level(logging.INFO)

    def level_of(request: Any, error: str) -> int:
        assert worker.wait_for_end(request) == "done"
        assert type(worker.meta(request)["result"]).__name__ == error
        (record,) = [each for each in caplog.records if f"[{request.id}] raised " in each.getMessage()]
        return record.levelno

    assert level_of(worker.take(steps=-1), "InvalidRequest") == logging.INFO
    worker.broker.died_on["killer"] = ["a", "b", "c", "d"]
    assert level_of(worker.take("killer", redelivered=True), "DeliveryLimitExceeded") == logging.ERROR
    worker.engine.nan = frozenset({"not finite"})
    assert level_of(worker.take("not finite"), "GenerationFailed") == logging.ERROR
    worker.images.error = StorageError("the store is away")
    assert level_of(worker.take(), "StorageError") == logging.ERROR


def test_a_job_whose_image_cannot_be_stored_while_the_worker_stops_goes_back(worker):
    request = worker.take(steps=300)
    worker.wait_for_slot(request)
    worker.images.error = StorageError("the store is away")
    worker.pool.on_close()
    assert worker.wait_for_end(request) == "requeued"
    assert worker.meta(request)["status"] in ("STARTED", "PROGRESS")


def test_a_terminated_job_whose_image_cannot_be_stored_is_revoked(worker):
    def put(*_: Any) -> str:
        terminate(worker, request)
        raise StorageError("the store is away")

    worker.images.put = put
    request = worker.take(steps=300)
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["status"] == "REVOKED"
