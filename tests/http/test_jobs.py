"""The jobs API: a job's life, its picture, its events; what is refused."""

from __future__ import annotations

import hashlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis import Redis

from sdtpu_worker.contract.load_report import WorkerLoad, publish_load
from sdtpu_worker.testing.processes import free_port
from sdtpu_worker.web.parameters import digest_of
from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import read_events, start_door, wait_for_end
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("worker")


def enqueue(client: httpx.Client, headers: dict[str, str] | None = None, **parameters) -> dict:
    answer = client.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 2, **parameters}, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


# The life of a job


def test_a_job_is_accepted_at_once_and_succeeds_later(client):
    answer = client.post("/v1/jobs", json={"prompt": "a fox", "seed": 7, "num_inference_steps": 3})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"] == f"{client.base_url}/v1/jobs/{job['id']}"
    assert (job["status"], job["result"], job["error"]) == ("queued", None, None)
    job = wait_for_end(client, job["id"])
    assert job["status"] == "succeeded"
    assert job["result"]["seed"] == 7
    assert job["result"]["reused"] is False
    assert job["result"]["image"]["format"] == "png"
    assert "uri" not in job["result"]["image"]
    assert shown_count(client.get(job["links"]["image"]).content) == expected_count(7, 3)


def test_a_running_job_shows_its_progress(client):
    job = enqueue(client, num_inference_steps=250)
    seen = []
    with client.stream("GET", job["links"]["events"]) as answer:
        for event in read_events(answer.iter_lines()):
            if event.name == "progress" and event.data.get("percent"):
                seen.append(client.get(job["links"]["self"]).json())
    running = [each for each in seen if each["status"] == "running"]
    assert running
    assert all(0 < each["progress"]["percent"] <= 100 for each in running)
    assert running[-1]["progress"]["eta_s"] is not None


def test_a_failed_job_says_why(client):
    job = wait_for_end(client, enqueue(client, prompt="nan")["id"])
    assert job["status"] == "failed"
    assert job["error"]["type"] == "GenerationFailed"
    answer = client.get(job["links"]["self"] + "/image")
    assert answer.status_code == 410
    assert answer.json()["code"] == "GenerationFailed"


def test_a_large_seed_is_there_as_text_too(client):
    assert enqueue(client, seed=2**60 + 1)["parameters"]["seed_text"] == str(2**60 + 1)


def test_prefer_wait_answers_with_the_end_if_it_comes_in_time(client):
    answer = client.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 2}, headers={"Prefer": "wait=60"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=60"
    began = time.monotonic()
    late = client.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 1000}, headers={"Prefer": "wait=5"})
    assert (late.status_code, late.json()["status"]) == (202, "running"), "the wait is over long before the job"
    assert time.monotonic() - began > 4.9
    client.delete(f"/v1/jobs/{late.json()['id']}")


def test_a_cancelled_job_ends_at_once_and_gives_its_slot_back(client):
    jobs = [enqueue(client, num_inference_steps=1000) for _ in range(6)]
    for job in jobs:
        answer = client.delete(f"/v1/jobs/{job['id']}")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert wait_for_end(client, enqueue(client)["id"])["status"] == "succeeded"
    assert client.get(f"/v1/jobs/{jobs[0]['id']}").json()["status"] == "cancelled"


def test_a_job_that_is_done_is_not_cancelled(client):
    job = wait_for_end(client, enqueue(client)["id"])
    assert client.delete(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"
    assert client.get(job["links"]["image"]).status_code == 200


# Idempotency


def test_the_same_key_gives_the_same_job(client):
    key = {"Idempotency-Key": "order-17"}
    first = enqueue(client, key, seed=3)
    assert enqueue(client, key, seed=3)["id"] == first["id"]
    assert enqueue(client, {"Idempotency-Key": "order-18"}, seed=3)["id"] != first["id"]
    other = client.post("/v1/jobs", json={"prompt": "another"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "KeyReused")


def test_requests_of_one_key_at_the_same_time_make_one_job(client):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: enqueue(client, {"Idempotency-Key": "at once"}, seed=3)["id"], range(8)))
    assert len(set(made)) == 1


def test_a_refused_request_does_not_use_its_key_up(client):
    key = {"Idempotency-Key": "order-19"}
    assert client.post("/v1/jobs", json={"prompt": " "}, headers=key).status_code == 400
    assert enqueue(client, key)["status"] in ("queued", "running")


def test_a_key_whose_first_request_is_under_way_is_in_progress(client, redis_url):
    body = {"prompt": "a fox"}
    name = f"sdtpu:http:once::{hashlib.sha256(b'taken').hexdigest()}"
    with Redis.from_url(redis_url) as redis:
        redis.set(name, f"{uuid.uuid4()} {digest_of(body)}", ex=60)
    answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "taken"})
    assert (answer.status_code, answer.json()["code"]) == (409, "InProgress")


# What is kept


def test_what_the_door_keeps_of_a_job_ends_with_its_result(client, redis_url):
    job = enqueue(client, {"Idempotency-Key": "kept"})
    wait_for_end(client, job["id"])
    keys = [f"sdtpu:http:job:{job['id']}", f"sdtpu:http:once::{hashlib.sha256(b'kept').hexdigest()}",
            "sdtpu:http:jobs:", f"celery-task-meta-{job['id']}"]  # fmt: skip
    with Redis.from_url(redis_url) as redis:
        left_s = {key: redis.ttl(key) for key in keys}
        assert all(86_000 < each <= 86_400 for each in left_s.values()), left_s
        redis.delete(keys[0])
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404


# The picture


def test_a_picture_has_a_type_a_tag_and_cache_headers(client):
    job = wait_for_end(client, enqueue(client, image_format="webp")["id"])
    answer = client.get(job["links"]["image"])
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()[:32]}"'
    assert answer.headers["cache-control"].startswith("private, max-age=86400")
    assert answer.headers["x-content-type-options"] == "nosniff"
    unchanged = client.get(job["links"]["image"], headers={"If-None-Match": f'"other", {answer.headers["etag"]}'})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


def test_parts_of_a_picture_are_sent(client):
    job = wait_for_end(client, enqueue(client)["id"])
    url = job["links"]["image"]
    whole = client.get(url).content

    def part(wanted: str, **headers: str) -> httpx.Response:
        return client.get(url, headers={"Range": wanted, **headers})

    answer = part("bytes=2-5")
    assert (answer.status_code, answer.content) == (206, whole[2:6])
    assert answer.headers["content-range"] == f"bytes 2-5/{len(whole)}"
    assert part("bytes=-4").content == whole[-4:]
    assert part("bytes=10-").content == whole[10:]
    assert part("bytes=0-99999").content == whole
    for whole_again in (
        part("bytes=0-1,4-5"),
        part("lines=1-2"),
        part("bytes=-"),
        part("bytes=1-2", **{"If-Range": "x"}),
    ):
        assert (whole_again.status_code, whole_again.content) == (200, whole)
    outside = part(f"bytes={len(whole)}-")
    assert (outside.status_code, outside.headers["content-range"]) == (416, f"bytes */{len(whole)}")
    assert part("bytes=-0").status_code == 416


def test_a_picture_that_is_not_there_yet_is_a_conflict(client):
    job = enqueue(client, num_inference_steps=1000)
    answer = client.get(job["links"]["self"] + "/image")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    client.delete(job["links"]["self"])


# Events


def test_events_come_in_order_and_end_with_the_job(client):
    job = enqueue(client, seed=5, num_inference_steps=250)
    with client.stream("GET", job["links"]["events"]) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = list(read_events(answer.iter_lines()))
    assert [event.name for event in events].count("done") == 1
    done = events[-1]
    assert (done.name, done.data["status"], done.data["id"]) == ("done", "succeeded", job["id"])
    steps = [event.data["current"] for event in events if event.name == "progress" and "current" in event.data]
    assert steps == sorted(steps)
    assert len(steps) > 3
    previews = [event for event in events if event.name == "preview"]
    assert previews
    assert len({event.data["b64_json"] for event in previews}) == len(previews)


def test_a_client_that_comes_back_gets_what_it_has_not_seen(client):
    job = enqueue(client, num_inference_steps=250)
    last = None
    with client.stream("GET", job["links"]["events"]) as answer:
        for event in read_events(answer.iter_lines()):
            last = event.id or last
            if event.name == "preview":
                break
    with client.stream("GET", job["links"]["events"], headers={"Last-Event-ID": last}) as answer:
        events = list(read_events(answer.iter_lines()))
    assert last not in [event.id for event in events]
    assert events[-1].name == "done"
    again = client.get(job["links"]["events"], headers={"Last-Event-ID": events[-1].id})
    assert again.status_code == 204
    with client.stream("GET", job["links"]["events"]) as answer:
        assert [event.name for event in read_events(answer.iter_lines())] == ["done"]


def test_a_stream_of_a_cancelled_job_ends(client):
    job = enqueue(client, num_inference_steps=1000)
    with client.stream("GET", job["links"]["events"]) as answer:
        events = read_events(answer.iter_lines())
        next(events)
        client.delete(job["links"]["self"])
        assert list(events)[-1].data["status"] == "cancelled"


# The list


def test_the_list_has_the_newest_first_in_pages(client):
    ids = [enqueue(client)["id"] for _ in range(5)]
    first = client.get("/v1/jobs", params={"limit": 3}).json()
    second = client.get("/v1/jobs", params={"limit": 2, "before": first["next"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]


# Refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": 1}, "prompt must be a string"),
        ({"prompt": "a fox", "steps": 3}, "'steps' is no field of this request"),
        ({"prompt": "a fox", "height": 7}, "height must be a multiple of 8"),
        ({"prompt": "a fox", "priority": True}, "priority must be an integer"),
        ({"prompt": "a fox", "expires": "soon"}, "expires must be seconds"),
        ([], "body must be a JSON object"),
    ],
)
def test_a_wrong_body_is_explained(client, body, words):
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"prompt": "a", "seed": NaN}', '{"seed": ' + "9" * 5000 + "}", "\xff"]
)
def test_what_is_not_json_is_explained(client, text):
    answer = client.post("/v1/jobs", content=text.encode("latin-1"), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "InvalidRequest")


def test_a_form_of_another_site_is_refused(client):
    assert client.post("/v1/jobs", data={"prompt": "a fox"}).status_code == 415
    assert client.post("/v1/jobs", content='{"prompt": "a fox"}').status_code == 415


def test_a_body_that_is_too_large_is_refused(client):
    answer = client.post("/v1/jobs", json={"prompt": "a" * 17_000_000})
    assert (answer.status_code, answer.json()["code"]) == (413, "BodyTooLarge")


@pytest.mark.parametrize("path", ["/v1/jobs/x", "/v1/jobs/00000000-0000-4000-8000-000000000000/events", "/nothing"])
def test_what_is_not_there_is_not_found(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_method_that_a_path_has_not_is_refused(client):
    answer = client.put("/v1/jobs")
    assert (answer.status_code, answer.headers["content-type"]) == (405, "application/problem+json")


def test_a_job_in_the_queue_says_how_many_are_ahead_and_when_its_picture_will_be_there(redis_url, tmp_path):
    load = WorkerLoad("waits", 1, {"8x8": 0.1}, mean_job_s=10.0, held={6: 1}, next_free_s=10.0)
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="waits") as door, door.client() as client:
        alone = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
        assert client.get(alone["links"]["self"]).json()["wait"] == {"ahead": 0, "eta_s": None}, "no worker is there"
        second = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
        with Redis.from_url(redis_url) as redis:
            publish_load(redis, "waits", load, ttl_s=600)

        def known_wait() -> dict | None:  # Redis is looked at once a second
            wait = client.get(second["links"]["self"]).json()["wait"]
            return wait if wait and wait["eta_s"] else None

        wait = wait_until(known_wait, "the place in the queue")
        assert wait["ahead"] == 1
        assert wait["eta_s"] > 20, "one job is at work, one is ahead"
        assert client.delete(second["links"]["self"]).json()["wait"] is None


def test_a_deadline_that_cannot_be_kept_is_refused(redis_url, tmp_path):
    load = WorkerLoad("busy", 1, {}, mean_job_s=100.0, held={6: 3}, next_free_s=100.0)
    with Redis.from_url(redis_url) as redis:
        publish_load(redis, "busy", load, ttl_s=600)
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="busy") as door, door.client() as client:
        answer = client.post("/v1/jobs", json={"prompt": "a fox", "expires": 1})
    assert (answer.status_code, answer.json()["code"]) == (503, "DeadlineUnreachable")
    assert int(answer.headers["retry-after"]) >= 100


def test_without_redis_the_door_says_so(tmp_path):
    with start_door(f"redis://127.0.0.1:{free_port()}/0", tmp_path) as door, door.client() as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        answer = client.post("/v1/jobs", json={"prompt": "a fox"})
        assert (answer.status_code, answer.json()["code"]) == (503, "RedisUnavailable")
        assert answer.headers["retry-after"]
        assert "127.0.0.1" not in answer.text
    assert "POST /v1/jobs was refused: " in door.log.read_text()
