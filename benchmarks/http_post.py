"""How much later than `delay()` a job is in its queue that came by `POST /v1/jobs`.

    python benchmarks/http_post.py --jobs 500

A private Redis and a door run; there is no worker. `delay()` and `POST` take turns, one job at a time, each timed from
the call to its return: the message is in its queue then. Prints the median, the 99th percentile and the difference of
the medians in ms. The target is 5 ms at most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from celery import Celery

from sdtpu_worker import generate, install
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_env


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=500)
    jobs = parser.parse_args().jobs
    with private_redis() as url, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "door.log"
        command = [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "serve", "--address",
                   "127.0.0.1:0"]  # fmt: skip
        with running(command, log, env=worker_env(url)) as door:
            address = wait_for_line(door, log, "door: http://", 60).partition("door: ")[2].partition(",")[0]
            wait_for_line(door, log, "startup complete", 30)
            install(Celery("client", broker=url, backend=url))
            with httpx.Client(base_url=address, trust_env=False) as client:
                measure(client, jobs)


def measure(client: httpx.Client, jobs: int) -> None:
    """Send, time, print."""
    delays: list[float] = []
    posts: list[float] = []
    for number in range(jobs + 20):  # the first ones open connections
        began = time.perf_counter()
        generate.delay("a fox")
        between = time.perf_counter()
        assert client.post("/v1/jobs", json={"prompt": "a fox"}).status_code == 202
        if number >= 20:
            delays.append(1000 * (between - began))
            posts.append(1000 * (time.perf_counter() - between))
    for name, times in (("delay()", delays), ("POST /v1/jobs", posts)):
        print(f"{name}: median {statistics.median(times):.2f} ms, p99 {statistics.quantiles(times, n=100)[98]:.2f} ms")
    print(f"difference of the medians: {statistics.median(posts) - statistics.median(delays):.2f} ms")


if __name__ == "__main__":
    main()
