"""One table for the three fronts: the door, the Flask blueprint and the Django app answer the same."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import read_events
from tests.support.waiting import wait_until
from tests.web.conftest import BASES, KINDS
from tests.web.fronts import Front, Reply

pytestmark = pytest.mark.usefixtures("worker")

UNKNOWN = "00000000-0000-4000-8000-000000000000"
SHOWN_HEADERS = ("content-type", "location", "retry-after", "etag", "cache-control", "allow", "x-content-type-options",
                 "preference-applied", "accept-ranges", "content-range", "content-security-policy")  # fmt: skip


def enqueue(front: Front, headers: dict[str, str] | None = None, **parameters: Any) -> dict[str, Any]:
    reply = front.post({"prompt": "a fox", "num_inference_steps": 2, **parameters}, **(headers or {}))
    assert reply.status in (200, 202), reply.body
    return reply.json()


def events_of(front: Front, job_id: str, **headers: str) -> list[Any]:
    with front.stream(f"/v1/jobs/{job_id}/events", headers) as parts:
        return list(read_events(b"".join(parts).decode().splitlines()))


# What differs between the fronts is nothing but where they are


def everything(front: Front) -> list[tuple[str, int, dict[str, str], str]]:
    """Send every kind of request; return what came back, without what differs from job to job."""
    job = front.end(enqueue(front, seed=7)["id"])
    place = f"/v1/jobs/{job['id']}"
    etag = front.get(f"{place}/image").headers["etag"]
    replies = {
        "made": front.post({"prompt": "a fox", "seed": 7, "num_inference_steps": 2}, Prefer="wait=60"),
        "shown": front.get(place),
        "not modified": front.get(place, If_None_Match=front.get(place).headers["etag"]),
        "image": front.get(f"{place}/image"),
        "image not modified": front.get(f"{place}/image", If_None_Match=etag),
        "part": front.get(f"{place}/image", Range="bytes=2-5"),
        "no part": front.get(f"{place}/image", Range="bytes=999999-"),
        "cancelled too late": front.delete(place),
        "unknown": front.get(f"/v1/jobs/{UNKNOWN}"),
        "unknown picture": front.get(f"/v1/jobs/{UNKNOWN}/image"),
        "unknown events": front.get(f"/v1/jobs/{UNKNOWN}/events"),
        "no token": front.get(f"{place}/image?token=wrong"),
        "wrong page": front.get("/v1/jobs?limit=0"),
        "other query": front.get("/v1/jobs?page=2"),
        "other method": front.ask("PUT", "/v1/jobs", {}, b""),
        "other method of a job": front.ask("POST", place, {"Content-Type": "application/json"}, b"{}"),
        "no prompt": front.post({}),
        "wrong field": front.post({"prompt": "a fox", "steps": 3}),
        "tenant": front.post({"prompt": "a fox", "tenant": "bob"}),
        "wrong priority": front.post({"prompt": "a fox", "priority": 10}),
        "foreign picture": front.post({"prompt": "a fox", "image": "file:///etc/passwd"}),
        "no webhook": front.post({"prompt": "a fox", "webhook": "https://shop.example/done"}),
        "no object": front.post([]),
        "no JSON": front.post(b"{"),
        "a form": front.post(b"prompt=a+fox", "application/x-www-form-urlencoded"),
        "large": front.post({"prompt": "a" * 17_000_000}),
        "empty key": front.post({"prompt": "a fox"}, Idempotency_Key="k" * 300),
    }
    return [(name, reply.status, shown_headers(reply), plain(reply, job["id"])) for name, reply in replies.items()]


def shown_headers(reply: Reply) -> dict[str, str]:
    """Return the headers that clients use; their addresses without the server, and no tag of what is a job's own."""
    headers = {name: plain_text(reply.headers[name]) for name in SHOWN_HEADERS if name in reply.headers}
    if reply.headers.get("cache-control") == "private, no-cache":
        headers["etag"] = "of the job"
    return headers


def plain(reply: Reply, job_id: str) -> str:
    if reply.headers.get("content-type", "").startswith("image/"):
        return hashlib.sha256(reply.body).hexdigest()
    return re.sub(r'"(timings|batch|created_at)":(\{[^}]*\}|[0-9.]+)', r'"\1":0', plain_text(reply.body.decode()))


def plain_text(text: str) -> str:
    text = re.sub(r"https?://(127\.0\.0\.1:\d+|localhost|testserver)", "", text)
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)


def test_the_fronts_answer_the_same_to_every_kind_of_request(make_front):
    door, *others = (everything(make_front(kind)) for kind in KINDS)
    assert {status for _, status, _, _ in door} >= {200, 206, 304, 400, 404, 405, 413, 415, 416}
    for other in others:
        for expected, found in zip(door, other, strict=True):
            assert found == expected


# The life of a job


def test_a_job_is_accepted_at_once_and_succeeds_later(front, request):
    reply = front.post({"prompt": "a fox", "seed": 7, "num_inference_steps": 3})
    assert reply.status == 202
    job = reply.json()
    base = BASES[request.node.callspec.params["front"]]
    assert reply.headers["location"] == job["links"]["self"]
    assert job["links"]["self"].startswith(f"{base}/v1/jobs/" if base else "http://127.0.0.1:")
    job = front.end(job["id"])
    assert (job["status"], job["result"]["seed"]) == ("succeeded", 7)
    assert shown_count(front.get(f"/v1/jobs/{job['id']}/image").body) == expected_count(7, 3)


def test_a_failed_job_says_why(front):
    job = front.end(enqueue(front, prompt="nan")["id"])
    assert (job["status"], job["error"]["type"]) == ("failed", "GenerationFailed")
    reply = front.get(f"/v1/jobs/{job['id']}/image")
    assert (reply.status, reply.json()["code"]) == (410, "GenerationFailed")


def test_a_job_is_cancelled(front):
    job = enqueue(front, num_inference_steps=1000)
    assert front.get(f"/v1/jobs/{job['id']}/image").status == 409
    assert front.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    assert front.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_the_same_key_gives_the_same_job_also_at_the_same_time(front):
    key = {"Idempotency-Key": "order-17"}
    with ThreadPoolExecutor(4) as threads:
        made = set(threads.map(lambda _: enqueue(front, key, seed=3)["id"], range(4)))
    assert len(made) == 1
    other = front.post({"prompt": "another"}, **key)
    assert (other.status, other.json()["code"]) == (422, "KeyReused")


def test_a_job_may_start_from_the_picture_of_another(front):
    first = front.end(enqueue(front, seed=1)["id"])
    second = front.end(enqueue(front, seed=1, image=f"job:{first['id']}", strength=0.5)["id"])
    assert second["parameters"]["image"] == "a picture"


def test_polling_costs_no_body_until_something_changes(front):
    job = enqueue(front, num_inference_steps=200)
    place, etag, seen = f"/v1/jobs/{job['id']}", "", []
    deadline = time.monotonic() + 120
    while (not seen or seen[-1]["status"] in ("queued", "running")) and time.monotonic() < deadline:
        reply = front.get(place, If_None_Match=etag)
        if reply.status == 304:
            assert reply.body == b""
            continue
        etag = reply.headers["etag"]
        seen.append(reply.json())
    assert seen[-1]["status"] == "succeeded"
    assert all(one != other for one, other in itertools.pairwise(seen))
    assert front.get(place, If_None_Match=etag).status == 304


def test_a_job_that_is_asked_for_again_and_again_shows_its_picture_forming(front):
    job = enqueue(front, num_inference_steps=1000)
    place = f"/v1/jobs/{job['id']}"

    def previews() -> list[Any]:
        (listed,) = [each for each in front.get("/v1/jobs?previews=true").json()["jobs"] if each["id"] == job["id"]]
        return [front.get(place).json()["preview"], listed["preview"]]

    first = wait_until(lambda: found if all(found := previews()) else [], "a preview")
    for preview in first:
        assert preview["format"] == "png"
        assert Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))).format == "PNG"
    wait_until(lambda: previews()[0] not in (None, first[0]), "another preview")
    assert [each["preview"] for each in front.get("/v1/jobs?limit=5").json()["jobs"] if each["id"] == job["id"]] == [
        None
    ]
    assert front.delete(place).json()["preview"] is None
    assert front.get(place).json()["preview"] is None
    refused = front.get("/v1/jobs?previews=7")
    assert (refused.status, "previews must be true or false" in refused.json()["detail"]) == (400, True)


# Events


def test_events_come_in_order_and_end_with_the_job(front):
    job = enqueue(front, seed=5, num_inference_steps=250)
    events = events_of(front, job["id"])
    assert [event.name for event in events].count("done") == 1
    assert (events[-1].name, events[-1].data["status"]) == ("done", "succeeded")
    steps = [event.data["current"] for event in events if event.name == "progress" and "current" in event.data]
    assert steps == sorted(steps)
    assert [event for event in events if event.name == "preview"]
    assert front.get(f"/v1/jobs/{job['id']}/events", Last_Event_ID=events[-1].id).status == 204
    assert [event.name for event in events_of(front, job["id"])] == ["done"]


def test_a_client_that_comes_back_gets_what_it_has_not_seen(front):
    job = enqueue(front, num_inference_steps=250)
    seen = b""
    with front.stream(f"/v1/jobs/{job['id']}/events", {}) as parts:
        while seen.count(b"id: ") < 2:
            seen += next(parts)
    last = re.findall(rb"id: (\w+)", seen)[-1].decode()
    again = events_of(front, job["id"], **{"Last-Event-ID": last})
    assert last not in [event.id for event in again]
    assert again[-1].name == "done"


# Whose


@pytest.mark.parametrize("kind", KINDS)
def test_callers_never_see_each_others_jobs_pictures_or_events(make_front, kind):
    ann, bob = make_front(kind, "ann"), make_front(kind, "bob")
    job = ann.end(enqueue(ann, prompt="ann's fox")["id"])
    place = f"/v1/jobs/{job['id']}"
    for reply in (bob.get(place), bob.get(f"{place}/image"), bob.get(f"{place}/events"), bob.delete(place)):
        assert (reply.status, reply.json()["code"]) == (404, "NoSuchJob")
        assert b"ann" not in reply.body
    assert b"ann's fox" not in bob.get("/v1/jobs").body
    assert b"ann's fox" in ann.get("/v1/jobs").body
    stolen = bob.post({"prompt": "a fox", "image": f"job:{job['id']}"})
    assert (stolen.status, stolen.json()["code"]) == (404, "NoSuchJob")
    made = [enqueue(each, {"Idempotency-Key": "1"})["id"] for each in (ann, bob)]
    assert made[0] != made[1]


def test_a_user_of_a_web_app_is_not_the_key_of_that_name(make_front):
    jobs = {kind: enqueue(make_front(kind))["id"] for kind in KINDS}
    assert make_front("flask").get(f"/v1/jobs/{jobs['door']}").status == 404
    assert make_front("door").get(f"/v1/jobs/{jobs['flask']}").status == 404


@pytest.mark.parametrize("kind", ["flask", "django"])
def test_nobody_is_asked_to_log_in(make_front, kind):
    nobody = make_front(kind, "")
    if kind == "flask":
        nobody = make_front_without_user(make_front)
    for reply in (nobody.get("/v1/jobs"), nobody.post({"prompt": "a fox"}), nobody.get(f"/v1/jobs/{UNKNOWN}")):
        assert (reply.status, reply.json()["code"]) == (401, "NotLoggedIn")


def make_front_without_user(make_front: Any) -> Front:
    front = make_front("flask")

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        return front.ask(method, path, {**headers, "X-User": ""}, body)

    return Front(ask, front.stream)
