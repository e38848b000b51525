"""A job that is handed over, and redelivered once more when it is done, with every kind of result backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import backend_app, in_process_worker
from tests.support.redelivery import follow_a_job

pytestmark = pytest.mark.timeout(120)

CONTINUED = {
    "told": ["requeued", "done", "done"],
    "events": ["task-started", "task-succeeded"],
    "images": 1,
    "continues": True,
}


def url_of(kind: str, folder: Path, redis_url: str) -> str:
    folder = folder / "results"
    folder.mkdir()
    return {"redis": redis_url, "file": f"file://{folder}", "database": f"db+sqlite:///{folder}/results.sqlite",
            "cache": "cache+memory://", "rpc": "rpc://", "none": "disabled://"}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["redis", "file", "database", "cache", "rpc", "none"])
def test_a_job_that_was_handed_over_ends_whatever_the_result_backend(kind, tmp_path, redis_url):
    found = follow_a_job(url_of(kind, tmp_path, redis_url))
    ran_again = found.pop("ran_again")
    assert found == CONTINUED
    assert ran_again is (kind in ("rpc", "none")), "only where nobody can say that it is done does it run again"


def test_a_job_that_was_handed_over_ends_with_the_database_of_a_django_project(tmp_path):
    command = [sys.executable, "-m", "tests.support.redelivery", "django-db", str(tmp_path / "django.sqlite")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {**CONTINUED, "ran_again": False}


class NoDatabase(Exception):
    """What a database's driver raises, of no class that anybody else knows."""


@pytest.mark.parametrize("kind", ["redis", "file", "database", "cache"])
def test_a_redelivered_job_whose_end_cannot_be_looked_up_goes_back(kind, tmp_path, redis_url, monkeypatch, caplog):
    with backend_app(url_of(kind, tmp_path, redis_url)) as app, in_process_worker(app) as worker:

        def fail(self: Any, task_id: str) -> None:
            raise NoDatabase("the server has gone away")

        monkeypatch.setattr(type(app.backend), "_get_task_meta_for", fail)
        request = worker.take(redelivered=True)
        assert worker.wait_for_end(request) == "requeued"
        assert worker.events.of(request.id)[-1:] != ["task-failed"]
        assert "its message is requeued" in caplog.text
        monkeypatch.undo()
        assert worker.wait_for_end(worker.take(request.id, redelivered=True)) == "done"
        assert worker.meta(request)["status"] == "SUCCESS"


@pytest.mark.parametrize("stored", ["no JSON", "{}", "[]", '{"status": "SUCCESS"}', '{"status": []}'])
@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_a_redelivered_job_of_which_no_state_but_something_else_is_stored_does_not_go_back_for_ever(stored, redis_url):
    """Celery cannot store over it either, so that such a message is counted whenever its lease expires."""
    with backend_app(redis_url) as app, in_process_worker(app) as worker:
        key = app.backend.get_key_for_task("forged").decode()
        app.backend.client.set(key, stored)
        request = worker.take("forged", redelivered=True)
        assert worker.wait_for_end(request) in ("done", "left")
        assert "forged" in worker.images.data
        app.backend.client.delete(key)
