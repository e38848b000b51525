"""What is served, the device batch, and the events of many jobs at once: the same at all fronts, for each caller."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.http.doors import Event, read_events
from tests.support.waiting import wait_until
from tests.web.conftest import KINDS
from tests.web.fronts import Front

pytestmark = pytest.mark.usefixtures("worker")

LONG, MOST_EVENTS, UNKNOWN = 1000, 400, "00000000-0000-4000-8000-000000000000"


def enqueue(front: Front, **parameters: Any) -> str:
    reply = front.post({"prompt": "a fox", "num_inference_steps": 2, **parameters})
    assert reply.status == 202, reply.body
    return reply.json()["id"]


@contextlib.contextmanager
def running(front: Front) -> Iterator[str]:
    """Have a job of this front's in a slot for the block."""
    job_id = enqueue(front, num_inference_steps=LONG)
    try:
        wait_until(lambda: job_id in json.dumps(front.get("/v1/jobs/batch").json()["hosts"]), "the job to have a slot")
        yield job_id
    finally:
        front.delete(f"/v1/jobs/{job_id}")


def events_of(front: Front, ids: list[str], last: str = "") -> Generator[Event, None, None]:
    """Yield what comes from a stream of some jobs."""
    headers = {"Last-Event-ID": last} if last else {}
    with front.stream(f"/v1/jobs/events?ids={','.join(ids)}", headers) as parts:

        def lines() -> Iterator[str]:
            rest = ""
            for part in parts:
                *whole, rest = (rest + part.decode()).split("\n")
                yield from whole

        for number, event in enumerate(read_events(lines())):
            assert number < MOST_EVENTS, "the events do not end"
            yield event


def test_the_capabilities_say_what_may_be_asked_for(front):
    def served() -> Any:  # a worker publishes what it serves a moment after it is ready
        found = front.get("/v1/jobs/capabilities").json()
        return found if found["workers"] else None

    found = wait_until(served, "the worker's report")
    assert (found["workers"], found["sizes"]) == (1, [{"height": 8, "width": 8}])
    assert found["steps"] == {"minimum": 1, "maximum": 1000, "default": 50}
    assert found["priorities"] == {"most_urgent": 0, "least_urgent": 9}
    assert found["prompt"] == {"most_characters": 10_000}


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_ones_own_or_busy(make_front, kind):
    ann, bob = make_front(kind, "ann"), make_front(kind, "bob")
    with running(ann) as job_id:
        seen = wait_until(
            lambda: [text for text in [str(bob.get(f"/v1/jobs/batch?ids={job_id}").body)] if '"busy"' in text]
        )
        assert job_id not in seen[0]
        for event in events_of(bob, [job_id]):
            assert job_id not in json.dumps(event.data)
            if event.name == "batch":
                break


def test_the_events_of_several_jobs_come_in_one_stream(front):
    ids = [enqueue(front, num_inference_steps=60) for _ in range(3)]
    done, steps = set(), {job_id: [] for job_id in ids}
    for event in events_of(front, ids):
        if event.name == "progress":
            steps[event.data["id"]].append(event.data.get("current", 0))
        if event.name == "done":
            done.add(event.data["id"])
        if done == set(ids):
            break
    assert done == set(ids)
    assert all(each == sorted(each) for each in steps.values())


def test_a_stream_that_comes_back_begins_after_what_was_seen(front):
    with running(front) as job_id:
        seen = next(event for event in events_of(front, [job_id]) if event.id)
        again = events_of(front, [job_id], seen.id or "")
        first = next(event for event in again if event.name in ("progress", "preview"))
        again.close()
        assert first.id != seen.id


def test_a_stream_without_jobs_shows_the_batch_and_ids_that_are_none_are_refused(front):
    assert next(events_of(front, [])).name == "batch"
    assert next(events_of(front, [UNKNOWN])).name == "batch"
    for query in ("ids=1", f"ids={','.join([UNKNOWN[:-2] + format(n, '02d') for n in range(51)])}", "id=1"):
        for path in ("events", "batch"):
            reply = front.get(f"/v1/jobs/{path}?{query}")
            assert (reply.status, reply.json()["code"]) == (400, "InvalidRequest")


def test_the_page_is_off_in_a_web_app_and_on_at_the_door_unless_somebody_says_otherwise(make_front):
    found = {kind: make_front(kind).get("/v1/jobs/page/").status for kind in KINDS}
    assert found == {"door": 200, "flask": 404, "django": 404}
    for kind in KINDS:
        front = make_front(kind)
        script = front.get("/v1/jobs/page/page.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert front.get("/v1/jobs/page/page.js", If_None_Match=script.headers["etag"]).status == 304
        assert front.get("/v1/jobs/page/index.html").status == 404
        assert front.get("/v1/jobs/page/endpoints.py").status == 404
