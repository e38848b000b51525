"""A part of `accelerator.py`: a real Redis and a real worker, with all jobs there at once.

    python benchmarks/accelerator_worker.py --model MODEL --slots 4 --out FILE --seconds 200

Needs `pip install -e '.[demo]'` for a Redis. From the first message sent to the last result stored, with PNG encoding,
progress and all that a user gets. The worker holds the devices alone: no other part may run beside it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from celery import Celery

from benchmarks.accelerator_figures import Report, part_parser
from sdtpu_worker import generate, install
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env

_FIRST_ROUNDS, _MOST_ROUNDS, _SHARE = 1, 8, 0.6


def main() -> None:
    """Measure a worker at saturation."""
    parser = part_parser(__doc__, compile_cache="auto")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Redis and the worker end too
    report = Report(args.out, slots_per_device=args.slots)
    with tempfile.TemporaryDirectory() as folder, private_redis() as url:
        log = Path(folder) / "worker.log"
        env = worker_env(
            url,
            SDTPU_MODEL=args.model,
            SDTPU_PLATFORM=args.platform,
            SDTPU_CPU_DEVICES=str(args.cpu_devices),
            SDTPU_SLOTS_PER_DEVICE=str(args.slots),
            SDTPU_COMPILE_CACHE=args.compile_cache,
        )
        started = time.monotonic()
        with running(worker_command("sdtpu_worker.app"), log, env) as process:
            ready = wait_for_line(process, log, "ready:", until - time.monotonic())
            report.add("start of a worker until it is ready", [time.monotonic() - started], "s", line=ready[-300:])
            with contextlib.closing(install(Celery(broker=url, backend=url))) as app:
                app.set_default()
                _saturate(app, report, args.steps, until)


def _saturate(app: Celery, report: Report, steps: int, until: float) -> None:
    """Send rounds of as many jobs as the worker has slots: a first one to see how long it takes, then many at once."""
    slots = _stats(app)["slots"]
    first_s = _serve(_FIRST_ROUNDS * slots, steps)
    rounds = int(min(_MOST_ROUNDS, max(2, _SHARE * (until - time.monotonic()) / first_s)))
    before = _stats(app)["loop"]
    elapsed_s = _serve(rounds * slots, steps)
    after = _stats(app)["loop"]
    what = {"jobs": rounds * slots, "of": f"jobs all of {steps} steps, Celery worker and Redis", "steps": [steps]}
    report.add("images", [rounds * slots / elapsed_s], "images/s of all devices", **what)
    occupied = after["occupied_slot_s"] - before["occupied_slot_s"]
    report.add("occupancy", [occupied / slots / elapsed_s], "share of all slots", **what)


def _serve(count: int, steps: int) -> float:
    """Return the seconds from the first message to the last result."""
    started = time.perf_counter()
    results = [
        generate.delay("a red circle", seed=seed, num_inference_steps=steps, sampler="ddim") for seed in range(count)
    ]
    for result in results:
        result.get(timeout=600)
    return time.perf_counter() - started


def _stats(app: Celery, tries: int = 15) -> dict[str, Any]:
    """Return what the worker says of its pool; it says `ready` a moment before it listens to questions."""
    for _ in range(tries):
        if answers := app.control.inspect(timeout=2).stats():
            (stats,) = answers.values()
            found: dict[str, Any] = stats["pool"]["sdtpu"]
            return found
    raise TimeoutError(f"the worker did not answer `inspect stats` {tries} times")


if __name__ == "__main__":
    main()
