"""Who may ask for what: keys, their limits, and callers without a key."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from click.testing import CliRunner
from redis import Redis

from sdtpu_worker.cli import sdtpu
from sdtpu_worker.config_values import parse_http_keys
from sdtpu_worker.contract.queues import tenant_queue
from sdtpu_worker.http.callers import is_loopback
from sdtpu_worker.http.keys import hash_key
from tests.http.doors import DoorProcess, keys, read_events, start_door, wait_for_end
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture(scope="module")
def locked(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """Run a door with three keys."""
    callers = keys(ann="", bob="", small=":3-6:2")
    with start_door(redis_url, tmp_path_factory.mktemp("locked"), SDTPU_HTTP_KEYS=callers) as door:
        yield door


@pytest.fixture
def ann(locked: DoorProcess) -> Iterator[httpx.Client]:
    with locked.client("sk-ann") as client:
        yield client


@pytest.fixture
def bob(locked: DoorProcess) -> Iterator[httpx.Client]:
    with locked.client("sk-bob") as client:
        yield client


@pytest.mark.parametrize("key", ["", "sk-eve", "sk-an", "SK-ANN", "\xff"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/sdapi/v1/options", "/sdapi/v1/progress"])
def test_without_a_key_that_is_known_nothing_is_answered(locked, key, path):
    with httpx.Client(base_url=locked.url, timeout=30, trust_env=False) as client:
        headers = {b"Authorization": b"Bearer " + key.encode("latin-1")} if key else {}
        answer = client.get(path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_the_key_may_be_the_password_of_basic(locked):
    with httpx.Client(base_url=locked.url, auth=("whoever", "sk-ann"), timeout=30, trust_env=False) as client:
        assert client.get("/v1/jobs").status_code == 200


def test_health_needs_no_key(locked):
    for path in ("/livez", "/readyz", "/openapi.json"):
        assert httpx.get(locked.url + path, timeout=30, trust_env=False).status_code == 200


def test_callers_never_see_each_others_jobs_pictures_or_events(ann, bob):
    job = ann.post("/v1/jobs", json={"prompt": "ann's fox", "num_inference_steps": 2}).json()
    wait_for_end(ann, job["id"])
    place = f"/v1/jobs/{job['id']}"
    for answer in (bob.get(place), bob.get(place + "/image"), bob.get(place + "/events"), bob.delete(place)):
        assert (answer.status_code, answer.json()["code"]) == (404, "NoSuchJob")
        assert "ann" not in answer.text
    assert "ann's fox" not in bob.get("/v1/jobs").text
    assert "ann's fox" in ann.get("/v1/jobs").text
    with ann.stream("GET", place + "/events") as answer:
        assert [event.name for event in read_events(answer.iter_lines())] == ["done"]


def test_callers_do_not_share_idempotency_keys(ann, bob):
    made = [
        client.post("/v1/jobs", json={"prompt": "a fox"}, headers={"Idempotency-Key": "1"}).json()["id"]
        for client in (ann, bob)
    ]
    assert made[0] != made[1]


def test_an_interrupt_stops_the_callers_own_jobs_only(ann, bob):
    long = {"prompt": "a fox", "num_inference_steps": 150}
    job = bob.post("/v1/jobs", json=long).json()
    assert ann.post("/sdapi/v1/interrupt").status_code == 200
    assert ann.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
    assert wait_for_end(bob, job["id"])["status"] == "succeeded"


def test_a_callers_name_is_the_tenant_of_its_jobs(redis_url, tmp_path):
    settings = {"SDTPU_QUEUE": "of-tenants", "SDTPU_HTTP_KEYS": keys(ann="")}
    with start_door(redis_url, tmp_path, **settings) as door, door.client("sk-ann") as client:
        client.post("/v1/jobs", json={"prompt": "a fox", "priority": 0})
        answer = client.post("/v1/jobs", json={"prompt": "a fox", "tenant": "bob"})
        assert (answer.status_code, "'tenant'" in answer.json()["detail"]) == (400, True)
    with Redis.from_url(redis_url) as redis:
        assert redis.llen(tenant_queue("of-tenants", "ann", 16)) == 1


def test_where_there_are_no_keys_the_caller_names_the_tenant(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="of-users") as door, door.client() as client:
        client.post("/v1/jobs", json={"prompt": "a fox", "priority": 0, "tenant": "carl"})
    with Redis.from_url(redis_url) as redis:
        assert redis.llen(tenant_queue("of-users", "carl", 16)) == 1


def test_a_key_bounds_the_priority_and_the_number_of_unfinished_jobs(locked):
    with locked.client("sk-small") as small:
        for priority in (2, 7):
            answer = small.post("/v1/jobs", json={"prompt": "a fox", "priority": priority})
            assert "priority must be an integer from 3 (the most urgent) to 6" in answer.json()["detail"]
        long = {"prompt": "a fox", "num_inference_steps": 1000, "priority": 3}
        jobs = [small.post("/v1/jobs", json=long).json() for _ in range(2)]
        answer = small.post("/v1/jobs", json=long)
        assert (answer.status_code, answer.json()["code"]) == (429, "TooManyJobs")
        assert answer.headers["retry-after"]
        small.delete(f"/v1/jobs/{jobs[0]['id']}")
        third = small.post("/v1/jobs", json={**long, "num_inference_steps": 1})
        assert third.status_code == 202
        wait_for_end(small, third.json()["id"])
        small.delete(f"/v1/jobs/{jobs[1]['id']}")
        wait_until(lambda: small.post("/v1/jobs", json={**long, "num_inference_steps": 1}).status_code == 202)


def test_without_keys_a_name_that_points_here_from_elsewhere_is_refused(client):
    answer = client.get("/v1/jobs", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (403, "LocalCallersOnly")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8090"):
        assert client.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_without_keys_a_caller_from_elsewhere_is_refused(client):
    answer = client.get("/v1/jobs", headers={"X-Forwarded-For": "203.0.113.7"})  # as a proxy on this machine says
    assert answer.status_code == 403


def test_an_open_door_serves_strangers(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_HTTP_OPEN="on") as door, door.client() as client:
        assert client.get("/v1/jobs", headers={"Host": "images.example"}).status_code == 200


def test_pages_of_other_origins_need_to_be_named(client, redis_url, tmp_path):
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/jobs", headers=asked).headers
    with start_door(redis_url, tmp_path, SDTPU_HTTP_CORS_ORIGINS="https://shop.example") as door:
        with door.client() as other:
            answer = other.options("/v1/jobs", headers=asked)
            assert answer.headers["access-control-allow-origin"] == "https://shop.example"
            elsewhere = {**asked, "Origin": "https://evil.example"}
            assert "access-control-allow-origin" not in other.options("/v1/jobs", headers=elsewhere).headers


def test_a_door_without_keys_does_not_listen_to_the_world(redis_url, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", redis_url)
    run = CliRunner().invoke(sdtpu, ["serve", "--address", ":0"])
    assert run.exit_code == 1
    assert "no keys" in run.output
    assert "sdtpu key NAME" in run.output


def test_a_new_key_and_its_line_belong_together():
    run = CliRunner().invoke(sdtpu, ["key", "shop", "--priority", "3-9", "--max-jobs", "100"])
    assert run.exit_code == 0
    key, line = (text.rpartition(" ")[2] for text in run.output.splitlines())
    (parsed,) = parse_http_keys(line)
    assert parsed == ("shop", hash_key(key), (3, 9), 100)
    assert CliRunner().invoke(sdtpu, ["key", "a shop"]).exit_code == 1
    assert CliRunner().invoke(sdtpu, ["key", "shop", "--priority", "9-3"]).exit_code == 1


@pytest.mark.parametrize(
    "wrong", ["shop", "shop:abc", f"shop:{'0' * 64}:9-3", f"a b:{'0' * 64}", 7, [1], f"a:{'0' * 64},b:{'0' * 64}"]
)
def test_a_wrong_line_of_keys_is_refused(wrong):
    with pytest.raises(ValueError, match="SHA256"):
        parse_http_keys(wrong)


def test_loopback_is_told_from_other_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "shop.example")))
