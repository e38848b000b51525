"""All jobs at once: how much of the engine's own limit is left when the policy, the loop, Celery and Redis come on top.

    python benchmarks/limit.py [--jobs 384] [--repeats 3] [--step-ms 30]

Three ways to run the same jobs with the same compiled programs, in turn, in one run:

* bare: a loop that knows all jobs beforehand, hands them to the devices longest first, dispatches long ticks two ahead
  and throws the pictures away; of several tick lengths the fastest;
* loop: `DeviceLoop` with the step-level policy, which learns of each job as it comes;
* worker: a Celery worker with a real Redis, from the first message sent to the last result stored, with PNG encoding,
  progress and everything else that a user gets.

Prints medians in images per second and their ratios to the bare loop. Needs `pip install -e '.[demo]'`; about twenty
minutes on two CPU cores.

Simulated devices run on the same cores as Celery, Redis and the client, so whatever those need is taken from the
devices. With `--step-ms` the devices have a constant speed that leaves the CPU some time (`serving_constant_speed.py`),
as real ones do: what is lost then is what did not overlap with the devices' work.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import os
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.saturated_loop import run_all
from benchmarks.serving_constant_speed import hold_speed
from sdtpu_worker import GenerationRequest, install
from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.start import choose_dtype, make_warm_engine
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env

MIXES = {"all 30 steps": (30,), "10, 20, 30, 50 steps mixed": (10, 20, 30, 50)}
BARE_TICKS_S = (0.1, 0.2, 0.4, 0.8)
TRIAL_JOBS = 64
"""So many of the jobs choose the tick of the bare loop."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=0.0, help="of devices of constant speed; 0: as it comes (0)")
    args = parser.parse_args()
    os.environ["BENCHMARK_STEP_S"] = str(args.step_ms / 1000)
    devices = find_devices("auto", 8)
    cache = CompileCache("auto")
    checkpoint = load_checkpoint("embedded", choose_dtype("auto", devices[0].platform))
    engine = make_warm_engine(checkpoint, devices, 1, None, cache)
    if args.step_ms:
        hold_speed(engine)
    info = engine.info
    print(f"{info.num_devices} devices of kind {info.device_kind}, {args.jobs} jobs, {args.repeats} repeats")
    with celery_worker("benchmarks.serving_constant_speed:ours" if args.step_ms else "sdtpu_worker.app") as app:
        for name, mix in MIXES.items():
            requests = make_requests(args.jobs, mix)
            jobs = [engine.prepare(str(i), request) for i, request in enumerate(requests)]
            tick_s = max(BARE_TICKS_S, key=lambda tick_s: bare(engine, jobs[:TRIAL_JOBS], tick_s))
            rates: dict[str, list[float]] = {"bare": [], "loop": [], "worker": []}
            for _ in range(args.repeats):
                rates["bare"].append(bare(engine, jobs, tick_s))
                rates["loop"].append(loop(engine, jobs))
                rates["worker"].append(worker(app, requests))
            print(f"\n{name} (bare: ticks of {tick_s} s)\n{'':<8}{'images/s':>10}{'of bare':>9}")
            for system, measured in rates.items():
                ratio = statistics.median(a / b for a, b in zip(measured, rates["bare"], strict=True))
                spread = ", ".join(f"{rate:.2f}" for rate in measured)
                print(f"{system:<8}{statistics.median(measured):>10.2f}{ratio:>9.1%}   ({spread})", flush=True)
    print(f"\nprograms traced since the engine was ready: {engine.traces_since_ready}")


def make_requests(count: int, mix: Sequence[int]) -> list[GenerationRequest]:
    """Draw jobs; the last ones too are of all lengths, so some devices end early: part of the price."""
    draw = random.Random(0)
    return [
        GenerationRequest(
            "a red circle on a blue background", seed=i, num_inference_steps=draw.choice(mix), sampler="ddim"
        )
        for i in range(count)
    ]  # fmt: skip


def bare(engine: Engine, jobs: Sequence[PreparedJob], tick_s: float) -> float:
    """Return the images per second of plans that were made before the start."""
    by_id = {job.task_id: job for job in jobs}
    plans = list(plan_ahead(engine, jobs, tick_s))
    started = time.perf_counter()
    ticks = deque([engine.execute(plans[0], by_id)])
    images = 0
    for plan in plans[1:]:
        ticks.append(engine.execute(plan, by_id))
        images += len(ticks.popleft().wait())
    images += len(ticks.popleft().wait())
    assert images == len(jobs)
    return images / (time.perf_counter() - started)


def plan_ahead(engine: Engine, jobs: Sequence[PreparedJob], tick_s: float) -> Iterator[Plan]:
    """Yield ticks of equal work for devices with one slot each that know their jobs."""
    (lane,) = engine.info.resolutions
    cost = engine.costs[lane].cost
    work_s = {job.task_id: job.num_steps * cost.step_s + cost.insert_s + cost.decode_s for job in jobs}
    loads = [(0.0, d) for d in range(engine.info.num_devices)]
    queues: list[deque[PreparedJob]] = [deque() for _ in loads]
    for job in sorted(jobs, key=lambda job: -work_s[job.task_id]):
        load, d = heapq.heappop(loads)
        queues[d].append(job)
        heapq.heappush(loads, (load + work_s[job.task_id], d))
    running: list[tuple[str, int] | None] = [None] * engine.info.num_devices  # (task, steps left)
    while any(queues) or any(running):
        most = engine.info.phases_per_tick
        phases = [_phases(queues[d], running, d, cost, tick_s, most) for d in range(engine.info.num_devices)]
        yield Plan(lane, tuple(map(tuple, phases)))


def _phases(
    queue: deque[PreparedJob], running: list[tuple[str, int] | None], d: int, cost: Cost, tick_s: float, most: int
) -> list[Phase]:
    phases: list[Phase] = []
    while len(phases) < most and tick_s > 0:
        decode = insert = None
        held = running[d]
        if held and not held[1]:
            decode, held = (0, held[0]), None
        if held is None and queue:
            job = queue.popleft()
            insert, held = (0, job.task_id), (job.task_id, job.num_steps)
        tick_s -= (decode is not None) * cost.decode_s + (insert is not None) * cost.insert_s
        steps = min(held[1], max(1, round(tick_s / cost.step_s))) if held else 0
        tick_s -= steps * cost.step_s
        running[d] = (held[0], held[1] - steps) if held else None
        if not (decode or insert or steps):
            break
        phases.append(Phase(decode, insert, steps))
    return phases


def loop(engine: Engine, jobs: Sequence[PreparedJob]) -> float:
    """Return the images per second of the device loop with the step-level policy."""
    policy = Aggregator(engine.costs, engine.info.slots_per_device, engine.info.phases_per_tick, tick_s=0.1)
    elapsed_s, _ = run_all(engine, policy, jobs)
    return len(jobs) / elapsed_s


def worker(app: object, requests: Sequence[GenerationRequest]) -> float:
    """Return the images per second of a Celery worker."""
    from sdtpu_worker import generate

    started = time.perf_counter()
    results = [
        generate.delay(r.prompt, seed=r.seed, num_inference_steps=r.num_inference_steps, sampler=r.sampler)
        for r in requests
    ]  # fmt: skip
    for result in results:
        result.get(timeout=600)
    return len(requests) / (time.perf_counter() - started)


@contextlib.contextmanager
def celery_worker(worker_app: str) -> Iterator[object]:
    """Run a Redis and a worker on eight devices; yield the client's app."""
    from celery import Celery

    with tempfile.TemporaryDirectory() as folder, private_redis() as url:
        log = Path(folder) / "worker.log"
        with running(worker_command(worker_app), log, worker_env(url, SDTPU_CPU_DEVICES="8")) as process:
            wait_for_line(process, log, "ready:", 600)
            app = install(Celery(broker=url, backend=url))
            app.set_default()
            yield app
            app.close()


if __name__ == "__main__":
    main()
