"""A lone job on an idle worker: how long from `delay()` to its first step, beside a bare Celery round trip.

    python benchmarks/lone_job.py [--jobs 30]

Needs `pip install -e '.[demo]'`; about a minute. The bare round trip is a task of Celery's own that returns its
argument, on a worker with threads, from the call to the result; the lone job's time ends when its slot's first tick is
dispatched. Prints medians in ms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from celery import Celery

from sdtpu_worker import generate, install
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, private_redis() as url:
        ours, bare = Path(folder) / "ours.log", Path(folder) / "bare.log"
        env = worker_env(url)
        bare_command = worker_command("sdtpu_worker.app", "-P", "threads", "-Q", "bare", "-n", "bare@localhost")
        with (
            running(worker_command("sdtpu_worker.app"), ours, env) as process,
            running(bare_command, bare, env) as peer,
        ):
            wait_for_line(process, ours, "ready:", 600)
            wait_for_line(peer, bare, "ready.", 60)
            with install(Celery(broker=url, backend=url)) as app:
                app.set_default()
                round_trips, first_steps = [], []
                for i in range(args.jobs):
                    started = time.perf_counter()
                    app.send_task("celery.accumulate", ["x"], queue="bare").get(timeout=30)
                    round_trips.append(1000 * (time.perf_counter() - started))
                    result = generate.delay("a red circle", seed=i, num_inference_steps=10).get(timeout=60)
                    first_steps.append(1000 * result["timings"]["queued_s"])
                    time.sleep(0.1)
    print(f"bare Celery round trip:   {statistics.median(round_trips):6.1f} ms")
    print(f"delay() to its first tick:{statistics.median(first_steps):6.1f} ms")


if __name__ == "__main__":
    main()
