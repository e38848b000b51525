"""Many event streams at a time, and a Redis that restarts in the middle of them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis

from sdtpu_worker.testing.processes import (
    find_redis_server,
    free_port,
    running,
    wait_for_line,
    worker_command,
    worker_env,
)
from tests.http.doors import Event, read_events, start_door, wait_for_end
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

STREAMS = 200


async def read_stream(client: httpx.AsyncClient, job_id: str) -> list[Event]:
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.status_code == 200
        lines = [line async for line in answer.aiter_lines()]
    return list(read_events(lines))


@pytest.mark.usefixtures("worker")
def test_two_hundred_streams_get_the_events_of_their_own_job_in_order(door):
    async def run() -> list[list[Event]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=door.url, limits=limits, timeout=60, trust_env=False) as client:
            body = {"prompt": "a fox", "num_inference_steps": 150}
            made = await asyncio.gather(*(client.post("/v1/jobs", json=body) for _ in range(STREAMS // 4)))
            ids = [answer.json()["id"] for answer in made]
            streams = await asyncio.gather(*(read_stream(client, job_id) for job_id in ids * 4))
        for job_id, events in zip(ids * 4, streams, strict=True):
            assert events[-1].name == "done"
            assert events[-1].data["id"] == job_id
            assert events[-1].data["status"] == "succeeded"
            steps = [event.data["current"] for event in events if event.data.get("current") is not None]
            assert steps == sorted(steps)
        return streams

    assert sum(map(len, asyncio.run(run()))) > STREAMS, "the end was not all that was seen, however late they looked"
    with Redis.from_url(door_redis(door)) as redis:
        wait_until(lambda: not redis.pubsub_channels("celery-task-meta-*"), "the door to unsubscribe")


def door_redis(door) -> str:
    """Return the URL of the Redis that a door uses."""
    environ = Path(f"/proc/{door.process.pid}/environ").read_bytes().split(b"\0")
    return next(entry for entry in environ if entry.startswith(b"CELERY_RESULT_BACKEND=")).decode().partition("=")[2]


def test_a_stream_too_many_is_refused(redis_url, tmp_path):
    settings = {"SDTPU_QUEUE": "nobody", "SDTPU_HTTP_MAX_STREAMS": "2"}
    with start_door(redis_url, tmp_path, **settings) as door, door.client() as client:
        job = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(client.stream("GET", job["links"]["events"]))
            answer = client.get(job["links"]["events"])
            assert (answer.status_code, answer.json()["code"]) == (503, "TooManyStreams")
            refused = client.post("/v1/images/generations", json={"prompt": "a fox", "stream": True})
            assert refused.status_code == 503

        def takes_another() -> bool:
            with client.stream("GET", job["links"]["events"]) as answer:
                return answer.status_code == 200

        wait_until(takes_another, "the places to be free again")


def test_streams_end_cleanly_when_the_door_stops(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="nobody") as door, door.client() as client:
        job = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
        with client.stream("GET", job["links"]["events"]) as answer:
            events = read_events(answer.iter_lines())
            assert next(events).data == {"status": "queued"}
            door.process.terminate()
            assert list(events) == []
        door.process.wait(60)
        assert "Traceback" not in door.log.read_text()


class RestartingRedis:
    """A Redis that keeps what it has over a restart."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self.port}/0"

    @contextlib.contextmanager
    def run(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [find_redis_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--appendonly", "yes",
                   "--appendfsync", "always", "--dir", str(self.folder)]  # fmt: skip
        with running(command, self.folder / "redis.log") as process, Redis(port=self.port) as redis:
            wait_until(redis.ping, "Redis to answer")
            yield process


def test_streams_resume_after_a_restart_of_redis(tmp_path):
    server = RestartingRedis(tmp_path)
    with contextlib.ExitStack() as stack:
        first = server.run()
        process = first.__enter__()
        stack.callback(lambda: first.__exit__(None, None, None))
        log = tmp_path / "worker.log"
        settings = {"SDTPU_CPU_DEVICES": "2", "SDTPU_FAKE_STEP_MS": "20", "SDTPU_PROGRESS_S": "0.05",
                    "SDTPU_TICK_S": "0.04"}  # fmt: skip
        env = worker_env(server.url, **settings)
        worker = stack.enter_context(running(worker_command("tests.http.preview_worker"), log, env=env, cwd=ROOT))
        wait_for_line(worker, log, " ready.", 60)
        door = stack.enter_context(start_door(server.url, tmp_path))
        client = stack.enter_context(door.client())
        job = client.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 800}).json()
        answer = stack.enter_context(client.stream("GET", job["links"]["events"]))
        events = read_events(answer.iter_lines())
        before = next(event for event in events if event.data.get("current"))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        time.sleep(0.5)
        stack.enter_context(server.run())
        after = list(events)
        assert (after[-1].name, after[-1].data["status"]) == ("done", "succeeded")
        steps = [event.data["current"] for event in [before, *after] if event.data.get("current") is not None]
        assert steps == sorted(steps)
        assert len([step for step in steps if before.data["current"] < step < 800]) > 3
        assert wait_for_end(client, job["id"])["status"] == "succeeded"
