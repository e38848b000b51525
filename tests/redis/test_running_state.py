"""A running job's states, stored by Celery's Redis backend: none of them may overwrite the job's end."""

from __future__ import annotations

import uuid

import pytest
from celery import Celery
from celery.result import AsyncResult

from sdtpu_worker.worker import running_state
from sdtpu_worker.worker.running_state import store_running_state


@pytest.fixture(params=["", "?decode_responses=true"])
def task(request, redis_url):
    app = Celery("states", backend=redis_url + request.param, set_as_current=False)
    app.conf.result_expires = 60

    @app.task(shared=False)
    def draw():
        """Stand for the task."""

    draw.push_request(id=str(uuid.uuid4()), hostname="here")
    yield draw
    draw.pop_request()
    app.close()


def stored(task):
    return AsyncResult(task.request.id, app=task.app)._get_task_meta()


def test_states_follow_each_other_and_expire(task):
    assert store_running_state(task, "STARTED", {"pid": 7})
    assert store_running_state(task, "PROGRESS", {"percent": 10})
    assert (stored(task)["status"], stored(task)["result"]) == ("PROGRESS", {"percent": 10})
    assert 0 < task.backend.client.ttl(task.backend.get_key_for_task(task.request.id)) <= 60


def test_a_state_is_published_to_whoever_waits(task):
    with task.backend.client.pubsub(ignore_subscribe_messages=True) as subscriber:
        subscriber.subscribe(task.backend.get_key_for_task(task.request.id))
        subscriber.get_message(timeout=5)
        assert store_running_state(task, "PROGRESS", {"percent": 10})
        message = None
        while message is None:
            message = subscriber.get_message(timeout=5)
    assert task.backend.decode(message["data"])["result"] == {"percent": 10}


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE", "REVOKED"])
def test_an_end_stays(task, end):
    task.backend.store_result(task.request.id, "the end" if end == "SUCCESS" else ValueError("the end"), end)
    assert not store_running_state(task, "PROGRESS", {"percent": 10})
    assert stored(task)["status"] == end


def test_an_end_that_is_stored_while_a_state_is_being_stored_stays(task, monkeypatch):
    assert store_running_state(task, "PROGRESS", {"percent": 10})
    digest = running_state._digest

    def somebody_cancels(held):
        task.backend.store_result(task.request.id, ValueError("cancelled"), "REVOKED")
        return digest(held)

    monkeypatch.setattr(running_state, "_digest", somebody_cancels)
    assert not store_running_state(task, "PROGRESS", {"percent": 20})
    assert stored(task)["status"] == "REVOKED"
