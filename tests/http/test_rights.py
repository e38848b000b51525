"""The door with the least rights in Redis that SECURITY.md gives it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from redis import Redis, exceptions

from sdtpu_worker.testing.processes import private_redis
from tests.http.doors import keys, read_events, start_door
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def redis_of_the_door() -> Iterator[str]:
    """Give the URL, for the door, of a Redis that has the users of SECURITY.md and no other."""
    with private_redis() as url:
        with Redis.from_url(url) as redis:
            for line in re.findall(r"^ +ACL SETUSER (.+)$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE):
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
        with client.stream("GET", job["links"]["events"]) as answer:
            events = read_events(answer.iter_lines())
            assert next(events).data["status"] == "queued"
            assert client.delete(job["links"]["self"]).json()["status"] == "cancelled"
            assert next(events).data["status"] == "cancelled"
        assert client.post("/v1/images/generations", json={"prompt": "a fox", "n": 4}).status_code == 429
        assert client.get("/sdapi/v1/progress").status_code == 200
        assert client.post("/sdapi/v1/interrupt").status_code == 200


@pytest.mark.parametrize(
    "command", ["RPOP sdtpu", "HGETALL sdtpu:unacked", "GET sdtpu:dead", "EVAL return(1) 0", "KEYS *", "FLUSHALL"]
)
def test_a_door_with_the_least_rights_cannot_do_what_it_must_not(redis_of_the_door, command):
    with Redis.from_url(redis_of_the_door) as redis, pytest.raises(exceptions.NoPermissionError):
        redis.execute_command(*command.split())
