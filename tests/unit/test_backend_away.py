"""A result backend that is away holds up the threads of the jobs that need it, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.backends.cache import CacheBackend
from celery.worker import state

from sdtpu_worker.errors import EngineUnavailable
from tests.support.in_process import InProcessWorker, backend_app, in_process_worker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def worker() -> Iterator[InProcessWorker]:
    with backend_app("cache+memory://", sdtpu_progress_s=0.01) as app, in_process_worker(app) as worker:
        yield worker


class Outage:
    """Whether the result backend is away; then every store waits, until the worker stops."""

    def __init__(self, worker: InProcessWorker) -> None:
        self.worker, self.lasts, self.waiting = worker, False, 0

    def wait(self) -> None:
        """Do what a patient backend does."""
        self.waiting += 1
        while self.lasts:
            if self.worker.stopping.is_set():
                raise EngineUnavailable("the worker stopped before the result could be stored")
            time.sleep(0.002)


@pytest.fixture
def outage(worker, monkeypatch) -> Iterator[Outage]:
    outage, store = Outage(worker), CacheBackend.set

    def set_when_it_is_back(self: CacheBackend, key: Any, value: Any) -> Any:
        outage.wait()
        return store(self, key, value)

    monkeypatch.setattr(CacheBackend, "set", set_when_it_is_back)
    yield outage
    outage.lasts = False


def do_as_main_thread(act: Callable[[], Any]) -> Any:
    """Run what the main thread does; fail if that waits."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(act()), daemon=True)
    thread.start()
    thread.join(30)
    assert done, "the main thread waits for the result backend, so the worker answers nobody"
    return done[0]


def hold_up(worker: InProcessWorker, outage: Outage) -> Any:
    """Return a job with a slot whose thread waits for the result backend."""
    request = worker.take(steps=1000)
    worker.wait_for_slot(request)
    outage.waiting, outage.lasts = 0, True
    wait_until(lambda: outage.waiting, "the job's thread to store its progress")
    return request


def test_terminating_a_job_whose_thread_waits_for_the_result_backend_does_not_freeze_the_worker(worker, outage):
    request = hold_up(worker, outage)
    do_as_main_thread(lambda: request.terminate(worker.pool, "TERM"))
    assert request.id not in worker.broker.told
    outage.lasts = False
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["status"] == "REVOKED"


def test_a_terminated_job_whose_end_a_stopping_worker_cannot_store_goes_back(worker, outage):
    request = hold_up(worker, outage)
    do_as_main_thread(lambda: request.terminate(worker.pool, "TERM"))
    worker.stopping.set()
    assert worker.wait_for_end(request) == "requeued"


@pytest.mark.parametrize("reason", ["expired", "revoked"])
def test_taking_a_message_that_is_not_wanted_any_more_does_not_wait_for_the_result_backend(worker, outage, reason):
    outage.lasts = True
    state.revoked.add("a-revoked-job")
    options: dict[str, dict[str, Any]] = {"expired": {"expires": -1}, "revoked": {"task_id": "a-revoked-job"}}
    request = do_as_main_thread(lambda: worker.take(**options[reason]))
    wait_until(lambda: outage.waiting, "the job's thread to store its end")
    assert request.id not in worker.broker.told
    outage.lasts = False
    assert worker.wait_for_end(request) == "done"
    assert worker.meta(request)["status"] == "REVOKED"
    assert worker.events.of(request.id) == ["task-revoked"], "it never started"
    assert not worker.images.data


def test_an_end_that_the_result_backend_refuses_leaves_the_message_to_its_lease(worker, outage, monkeypatch, caplog):
    request = hold_up(worker, outage)
    monkeypatch.setattr(outage, "wait", lambda: 1 / 0)
    request.terminate(worker.pool, "TERM")
    outage.lasts = False
    assert worker.wait_for_end(request) == "left"
    assert f"the end of task {request.id} could not be stored: ZeroDivisionError" in caplog.text
