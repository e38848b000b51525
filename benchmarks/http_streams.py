"""Two thousand event streams on one door: does each get its job's events, in bounded memory?

    python benchmarks/http_streams.py --streams 2000 --seconds 60

A private Redis and a door run; there is no worker. A process of its own publishes the states of `--jobs` jobs, as a
worker does, each `--every` seconds; every job is watched by streams / jobs clients, which check that the events are of
their job and in order. Printed are the door's memory and file descriptors before, while and after, the lag from
publishing to the client, and the connections to Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from celery import Celery
from redis import Redis

from sdtpu_worker import install
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_env


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two states of a job")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))
    with private_redis() as url, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "door.log"
        command = [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "serve", "--address",
                   "127.0.0.1:0"]  # fmt: skip
        with running(command, log, env=worker_env(url, SDTPU_HTTP_MAX_STREAMS="100000")) as door:
            address = wait_for_line(door, log, "door: http://", 60).partition("door: ")[2].partition(",")[0]
            wait_for_line(door, log, "startup complete", 30)
            asyncio.run(measure(arguments, url, address, door.pid))


def footprint(pid: int) -> tuple[float, int]:
    """Return a process's resident memory in MiB, and its open file descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


class Tally:
    """What the clients have seen."""

    def __init__(self) -> None:
        self.events = self.open = self.done = self.wrong = self.disordered = 0
        self.lags_ms: list[float] = []


async def watch(client: httpx.AsyncClient, job_id: str, tally: Tally) -> None:
    """Read one job's stream to its end."""
    last = -1
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.status_code == 200, await answer.aread()
        tally.open += 1
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                tally.events += 1
                if name == "done":
                    tally.done += 1
                    tally.wrong += data["id"] != job_id
                elif data.get("current") is not None:
                    sent, _, owner = data["description"].partition(" ")
                    tally.wrong += owner != job_id
                    tally.disordered += data["current"] < last
                    last = data["current"]
                    tally.lags_ms.append(1000 * (time.time() - float(sent)))


async def measure(arguments: argparse.Namespace, url: str, address: str, pid: int) -> None:
    """Open the streams, publish, print."""
    app = install(Celery("publisher", broker=url, backend=url, set_as_current=False))
    limits, tally = httpx.Limits(max_connections=None), Tally()
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=None, trust_env=False) as client:
        ids = []
        for _ in range(arguments.jobs):
            ids.append((await client.post("/v1/jobs", json={"prompt": "a fox"})).json()["id"])
        before = footprint(pid)
        began = time.monotonic()
        tasks = [
            asyncio.create_task(watch(client, ids[number % len(ids)], tally)) for number in range(arguments.streams)
        ]
        while tally.open < arguments.streams:
            await asyncio.sleep(0.05)
        opened_s = time.monotonic() - began
        opened, peak = footprint(pid), 0.0
        rounds = max(1, int(arguments.seconds / arguments.every))
        for step in range(1, rounds + 1):
            due = time.monotonic() + arguments.every
            await asyncio.to_thread(publish, app, ids, step, rounds)
            peak = max(peak, footprint(pid)[0])
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.to_thread(end, app, ids)
        await asyncio.gather(*tasks)
    await asyncio.sleep(1)
    with Redis.from_url(url) as redis:
        channels = len(redis.pubsub_channels("*"))
        connections = sum(each["name"] == "" for each in redis.client_list())
    after = footprint(pid)
    lags = sorted(tally.lags_ms)
    print(f"{arguments.streams:,} streams of {arguments.jobs:,} jobs, opened in {opened_s:.1f} s")
    for when, (memory, files) in {"before": before, "with all streams open": opened, "after": after}.items():
        print(f"door {when}: {memory:.0f} MiB, {files:,} descriptors")
    print(f"door at most: {peak:.0f} MiB")
    print(f"{tally.events:,} events, {tally.done:,} streams ended; {tally.wrong} events of another job,"
          f" {tally.disordered} out of order")  # fmt: skip
    print(f"lag: {statistics.median(lags):.0f} ms median, {lags[int(0.99 * len(lags))]:.0f} ms p99")
    print(f"Redis: {connections} connections, {channels} channels left")


def publish(app: Celery, ids: list[str], step: int, rounds: int) -> None:
    """Store a state of every job."""
    for job_id in ids:
        meta = {"current": step, "total": rounds, "percent": 100 * step // rounds, "pending": False,
                "description": f"{time.time()} {job_id}", "eta_s": 1.0}  # fmt: skip
        app.backend.store_result(job_id, meta, "PROGRESS")


def end(app: Celery, ids: list[str]) -> None:
    """Let every job fail, which ends its streams."""
    for job_id in ids:
        app.backend.store_result(job_id, RuntimeError("the benchmark is over"), "FAILURE")


if __name__ == "__main__":
    main()
