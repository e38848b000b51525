"""The door with the least rights in Redis that SECURITY.md gives it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from celery import Celery
from redis import Redis, exceptions

from sdtpu_worker import install
from sdtpu_worker.client.queue_figures import read_figures
from sdtpu_worker.testing.processes import private_redis
from tests.http.doors import keys, read_events, start_door
from tests.support.paths import ROOT


def security_lines(start: str) -> list[str]:
    """Return the users of SECURITY.md whose names start so, as `ACL SETUSER` takes them."""
    text = (ROOT / "SECURITY.md").read_text()
    return re.findall(rf"^ +ACL SETUSER ({start}.*)$", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def redis_of_the_door() -> Iterator[str]:
    """Give the URL, for the door, of a Redis that has the users of SECURITY.md and no other."""
    with private_redis() as url:
        with Redis.from_url(url) as redis:
            for line in security_lines("sdtpu-"):
                redis.execute_command("ACL SETUSER", *line.split())
        yield url.replace("redis://", "redis://sdtpu-door:DOOR_PASSWORD@")


def test_a_door_with_the_least_rights_can_do_what_it_must(redis_of_the_door, tmp_path):
    settings = {"SDTPU_HTTP_KEYS": keys(ann=":0-9:3"), "SDTPU_MAX_QUEUE": "100"}
    with start_door(redis_of_the_door, tmp_path, **settings) as door, door.client("sk-ann") as client:
        assert client.get("/readyz").status_code == 200
        key = {"Idempotency-Key": "1"}
        made = [client.post("/v1/jobs", json={"prompt": "a fox"}, headers=key) for _ in range(2)]
        assert [answer.status_code for answer in made] == [202, 202], made[0].text
        job = made[0].json()
        assert [each["id"] for each in client.get("/v1/jobs").json()["jobs"]] == [job["id"]]
        batch = client.get(f"/v1/jobs/batch?ids={job['id']}").json()
        assert (batch["known"], batch["waiting"], batch["waits"]) == (True, 1, {job["id"]: {"ahead": 0, "eta_s": None}})
        with client.stream("GET", job["links"]["events"]) as answer:
            events = read_events(answer.iter_lines())
            assert next(events).data["status"] == "queued"
            assert client.delete(job["links"]["self"]).json()["status"] == "cancelled"
            assert next(events).data["status"] == "cancelled"
        assert client.post("/v1/images/generations", json={"prompt": "a fox", "n": 4}).status_code == 429
        assert client.get("/sdapi/v1/progress").status_code == 200
        assert client.post("/sdapi/v1/interrupt").status_code == 200


def test_a_door_that_may_not_look_at_messages_knows_no_places_and_all_else(redis_of_the_door, tmp_path):
    with Redis.from_url(redis_of_the_door.replace("sdtpu-door:DOOR_PASSWORD@", "")) as redis:
        redis.execute_command("ACL SETUSER", "sdtpu-door", "-lindex")
        try:
            with start_door(redis_of_the_door, tmp_path) as door, door.client() as client:
                job = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
                batch = client.get(f"/v1/jobs/batch?ids={job['id']}").json()
        finally:
            redis.execute_command("ACL SETUSER", "sdtpu-door", "+lindex")
    assert batch["known"]
    assert batch["waiting"] >= 1
    assert batch["waits"] == {}


def rights_of_a_scraped_door() -> list[str]:
    """Return what SECURITY.md adds to the user of a door whose `/metrics` is scraped."""
    text = " ".join((ROOT / "SECURITY.md").read_text().split())
    (rights,) = re.findall(r"A door whose `/metrics` is scraped needs `([^`]+)` besides", text)
    return rights.split()


def test_a_door_says_what_waits_only_with_the_rights_for_it(redis_of_the_door, tmp_path):
    with start_door(redis_of_the_door, tmp_path) as door, door.client() as client:
        answer = client.get("/metrics")
        assert (answer.status_code, answer.json()["code"]) == (503, "BrokerUnavailable")
        assert "no permissions" in door.log.read_text()
        with Redis.from_url(redis_of_the_door.replace("sdtpu-door:DOOR_PASSWORD@", "")) as redis:
            redis.execute_command("ACL SETUSER", "sdtpu-door", *rights_of_a_scraped_door())
            redis.zadd("sdtpu:unacked_index", {"tag": 1e12})
            redis.hset("sdtpu:unacked", "tag", "sdtpu\n{}")
            try:
                answer = client.get("/metrics")
            finally:
                for line in security_lines("sdtpu-door"):
                    redis.execute_command("ACL SETUSER", *line.split())
        assert answer.status_code == 200, answer.text
        assert 'sdtpu_requests_held{queue="sdtpu"} 1.0' in answer.text


def test_the_user_of_the_metrics_reads_the_figures_and_writes_nothing(redis_of_the_door):
    url = redis_of_the_door.replace("sdtpu-door:DOOR", "sdtpu-metrics:METRICS")
    with install(Celery("project", broker=url, set_as_current=False)) as app:
        assert read_figures(app)["sdtpu_workers"] == 0
    with Redis.from_url(url) as redis:
        redis.eval("return redis.call('LLEN', KEYS[1])", 1, "sdtpu")
        for refused in ("LPUSH sdtpu x", "RPOP sdtpu", "HDEL sdtpu:unacked x", "ZREM sdtpu:unacked_index x", "KEYS *"):
            with pytest.raises(exceptions.NoPermissionError):
                redis.execute_command(*refused.split())
        with pytest.raises(exceptions.ResponseError, match="can't run this command"):
            redis.eval("return redis.call('RPOP', KEYS[1])", 1, "sdtpu")


@pytest.mark.parametrize(
    "command", ["RPOP sdtpu", "HGETALL sdtpu:unacked", "GET sdtpu:dead", "EVAL return(1) 0", "KEYS *", "FLUSHALL"]
)
def test_a_door_with_the_least_rights_cannot_do_what_it_must_not(redis_of_the_door, command):
    with Redis.from_url(redis_of_the_door) as redis, pytest.raises(exceptions.NoPermissionError):
        redis.execute_command(*command.split())
