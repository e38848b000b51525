"""A job expires if it has had no slot in time, and for no other reason."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from sdtpu_worker.errors import EngineUnavailable, StorageError
from tests.support.in_process import Broker, InProcessWorker, backend_app, in_process_worker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

EXPIRED: dict[str, Any] = {"redelivered": True, "steps": 1000, "expires": -1}


@pytest.fixture
def app() -> Iterator[Any]:
    with backend_app("cache+memory://") as app:
        yield app


def end_elsewhere(app: Any, broker: Broker, task_id: str) -> str:
    """Redeliver an expired job to a second worker; return the state in which it ends."""
    with in_process_worker(app, broker, step_s=0.0001) as second:
        request = second.take(task_id, **EXPIRED)
        assert second.wait_for_end(request) == "done"
        return second.meta(request)["status"]


def wait_until_expired(request: Any) -> None:
    time.sleep(max(0.0, (request.expires - datetime.now(request.expires.tzinfo)).total_seconds()) + 0.01)


def hand_over(worker: InProcessWorker, request: Any) -> None:
    worker.pool.hand_over()
    assert worker.wait_for_end(request) == "requeued"


def test_a_rolling_restart_drops_no_job_that_had_its_slot_in_time(app):
    broker = Broker()
    with in_process_worker(app, broker, step_s=0.01) as first:
        request = first.take(steps=1000, expires=60)
        first.wait_for_slot(request)
        hand_over(first, request)
    assert end_elsewhere(app, broker, request.id) == "SUCCESS"


def test_a_job_that_is_handed_over_in_its_first_tick_does_not_expire_either(app):
    """There is no snapshot then."""
    broker = Broker()
    with in_process_worker(app, broker) as first:
        first.engine.gate = threading.Event()
        request = first.take(steps=1000, expires=60)
        wait_until(lambda: request.id in first.engine.inserted)
        first.pool.hand_over()
        first.engine.fail_late_at = tuple(range(1000))  # what is on the devices is lost
        first.engine.gate.set()
        assert first.wait_for_end(request) == "requeued"
    assert end_elsewhere(app, broker, request.id) == "SUCCESS"


def test_a_job_whose_worker_died_with_it_on_its_devices_does_not_expire(app):
    broker, task_id = Broker(), uuid.uuid4().hex
    broker.died_on[task_id] = ["a-host"]
    assert end_elsewhere(app, broker, task_id) == "SUCCESS"


def test_a_job_that_was_handed_over_without_a_slot_expires(app):
    broker = Broker()
    with in_process_worker(app, broker, step_s=0.01) as first:
        ahead = [first.take(steps=1000) for _ in range(2)]
        first.wait_for_slot(ahead[1])
        request = first.take(steps=1000, expires=60)
        hand_over(first, request)
    assert request.id not in broker.snapshots
    assert end_elsewhere(app, broker, request.id) == "REVOKED"


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_a_job_whose_result_a_stopping_worker_cannot_store_does_not_expire_elsewhere(app, monkeypatch):
    broker = Broker()
    with in_process_worker(app, broker) as first, monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> None:
            raise EngineUnavailable("the worker stopped before the result could be stored")

        patch.setattr(type(app.backend), "mark_as_done", refuse)
        patch.setattr(type(app.backend), "mark_as_failure", refuse)
        request = first.take(expires=60)
        assert first.wait_for_end(request) == "requeued"
    assert end_elsewhere(app, broker, request.id) == "SUCCESS"


def test_a_job_whose_image_a_stopping_worker_cannot_store_does_not_expire_elsewhere(app):
    broker = Broker()
    with in_process_worker(app, broker) as first:
        request = first.take(steps=1000, expires=60)
        first.wait_for_slot(request)
        first.images.error = StorageError("the store is away")
        first.pool.on_close()
        assert first.wait_for_end(request) == "requeued"
    assert end_elsewhere(app, broker, request.id) == "SUCCESS"


def test_a_job_that_is_tried_again_after_a_failure_of_the_devices_does_not_expire(app):
    with in_process_worker(app) as worker:
        worker.engine.gate, worker.engine.fail_late_at = threading.Event(), (0,)
        request = worker.take(expires=5)
        wait_until(lambda: request.id in worker.engine.inserted)
        wait_until_expired(request)
        worker.engine.gate.set()
        assert worker.wait_for_end(request) == "done"
        assert worker.meta(request)["status"] == "SUCCESS"


def test_a_job_that_was_redelivered_and_never_had_a_slot_expires(app):
    assert end_elsewhere(app, Broker(), uuid.uuid4().hex) == "REVOKED"
