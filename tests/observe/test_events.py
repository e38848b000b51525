"""Celery's own events of jobs, as Flower and celery-exporter read them, from a real worker process with `-E`."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import redis

from sdtpu_worker import generate
from tests.chaos.fleet import Fleet
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def events(app) -> Iterator[dict[str, list[str]]]:
    """Give the types of the events of each task, as they come."""
    found: dict[str, list[str]] = defaultdict(list)
    connection = app.connection_for_read()

    def take(event: dict) -> None:
        if event["type"].startswith("task-"):
            found[event["uuid"]].append(event["type"])

    receiver = app.events.Receiver(connection, handlers={"*": take})

    def run() -> None:
        receiver.capture(limit=None, timeout=None, wakeup=False)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield found
    receiver.should_stop = True
    thread.join(60)
    connection.release()


def test_every_job_has_its_events_from_receipt_to_end(redis_url, tmp_path, app, events):
    redis.Redis.from_url(redis_url).flushdb()
    app.conf.task_send_sent_event = True
    with Fleet(redis_url, tmp_path, SDTPU_CPU_DEVICES="1", SDTPU_FAKE_STEP_MS="20") as fleet:
        fleet.start("a", "-E")
        done = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 5}).id
        failed = generate.apply_async(("raise",), {"seed": 1, "num_inference_steps": 5}).id
        refused = app.send_task("sdtpu.generate", ("x",), {"steps": 5}, queue="sdtpu").id
        unknown = app.send_task("no.such", ("x",), queue="sdtpu").id
        running = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 1000}).id
        wait_until(lambda: "task-started" in events[running], lambda: dict(events))
        waiting = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 5}).id
        wait_until(lambda: "task-started" in events[waiting], lambda: dict(events))
        app.control.revoke(waiting)
        app.control.revoke(running, terminate=True)
        expected = {
            done: "task-succeeded", failed: "task-failed", refused: "task-failed", running: "task-revoked",
            waiting: "task-revoked", unknown: "task-failed",
        }  # fmt: skip
        wait_until(
            lambda: all({end, "task-sent"} <= set(events[task_id]) for task_id, end in expected.items()),
            lambda: dict(events),
        )
    for task_id in expected:
        of_worker = [event for event in events[task_id] if event != "task-sent"]  # the client's comes when it comes
        before_end = [] if task_id == unknown else ["task-received", "task-started"]
        assert of_worker == [*before_end, expected[task_id]]
        assert events[task_id].count("task-sent") == 1
