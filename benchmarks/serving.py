"""Serving, side by side: step-level batching, fixed batches, celery-batches and a plain Celery task.

    python -m benchmarks.serving                  # less than an hour on two cores
    python -m benchmarks.serving --step-ms 25     # on devices of constant speed
    python -m benchmarks.serving --quick          # a smoke run: one repeat, one load, 24 jobs

Needs `pip install -e '.[bench]'`. Every system has a worker and a private Redis of its own, the shipped
checkpoint, eight simulated CPU devices, DDIM and guidance 7.5, and ends each job with a PNG in Redis and a result
under its task id. All workers are up all the time, and take turns: an idle one needs less than 0.5 % of a core.

* `ours`: `celery -A sdtpu_worker.app worker`.
* `fixed-bucketed`, `fixed-mixed`: the same worker with fixed full-trajectory batches (`fixed_policy.py`).
* `celery-batches`, `plain`: what a user would write today, with `FlaxStableDiffusionPipeline` (`peers/`), in a virtual
  environment of their own, which is made when it is missing.

First every system gets all jobs of a mix at once. The images per second that `ours` makes of them, without the start
and the emptying, are the limit: 100 % load. Then jobs arrive at 40, 60, 80 and 95 % of it, the same schedule for every
system, another one in each repeat, from a process that sends when it is time and waits for nothing (open loop,
Poisson). A system is not asked for a load far above what it makes of all jobs at once, nor, in the same repeat, for
one above a load at which it fell behind (`serving_run.Run.kept_up`).

Simulated devices share the CPU's cores, so that a device which works alone is several times as fast as one of eight.
A batch of one is cheap then, and an idle device does no harm, unlike on eight real devices. With `--step-ms` every
device has a constant speed (`serving_constant_speed.py`); the CPU must be able to keep up with it.

`results.json` in the folder `--out` is written after every run; `--resume` goes on with it, `--plot-only` draws
`table.md` and `serving.png` from it again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving_load import MIXES, draw_arrivals
from benchmarks.serving_report import write_report
from benchmarks.serving_run import Run, measure
from benchmarks.serving_systems import ROOT, SAME_VERSIONS, SYSTEMS, Environment, Worker, make_peers_python
from sdtpu_worker.testing.processes import StartFailed

GUESSED_LIMIT = 10.0
"""Images per second, to say how long it will take before anything is measured."""
OVERHEAD_S = 6.0
"""Of a run, besides its schedule: the producer's start and the last jobs' way."""
HOPELESS = 0.5
"""A system that makes less than this share of the offered rate when it gets all jobs at once is not asked for it."""
CONFIG = ("jobs", "limit_jobs", "seed", "flush_interval", "step_ms")
"""The options that must be the same for all runs of one `results.json`."""


class Results:
    """The runs so far, in a file that is replaced after each."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.about = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(), "versions": _versions()}
        self.runs: list[Run] = []

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        results = cls(path, data["config"])
        results.about, results.runs = data["about"], [Run(**run) for run in data["runs"]]
        return results

    def add(self, run: Run) -> None:
        self.runs.append(run)
        lines = ",\n".join(json.dumps(run.to_json()) for run in self.runs)
        text = f'{{"config": {json.dumps(self.config)},\n"about": {json.dumps(self.about)},\n"runs": [\n{lines}\n]}}\n'
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)

    def has(self, system: str, mix: str, load: float | None, repeat: int) -> bool:
        return any((run.system, run.mix, run.load, run.repeat) == (system, mix, load, repeat) for run in self.runs)

    def limits(self) -> dict[str, float]:
        """Return by mix the images per second that are 100 % load, as far as they are measured."""
        found = {mix: [run.sustained for run in self._all_at_once("ours", mix)] for mix in MIXES}
        return {mix: median(values) for mix, values in found.items() if values}

    def is_hopeless(self, system: str, mix: str, load: float, repeat: int) -> bool:
        """Whether a load is beyond what a system can do, by what was seen of it."""
        rate = self.limits()[mix] * load / 100
        capacities = [max(run.sustained, run.throughput) for run in self._all_at_once(system, mix)]
        return (bool(capacities) and median(capacities) < HOPELESS * rate) or any(
            not run.kept_up
            for run in self.runs
            if (run.system, run.mix, run.repeat) == (system, mix, repeat) and run.load is not None and run.load < load
        )

    def _all_at_once(self, system: str, mix: str) -> list[Run]:
        return [run for run in self.runs if (run.system, run.mix, run.load) == (system, mix, None)]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    path = args.out / "results.json"
    config = {name: getattr(args, name) for name in CONFIG}
    results = Results.load(path) if path.exists() and (args.resume or args.plot_only) else Results(path, config)
    if not args.plot_only:
        if results.config != config:
            raise SystemExit(f"{path} was measured with {results.config}, got {config}: give the same or another --out")
        if path.exists() and not (args.resume or args.quick):
            raise SystemExit(f"{path} exists: give --resume to go on with it, or another --out")
        try:
            _measure_all(args, results)
        except StartFailed as exc:
            raise SystemExit(str(exc)) from exc
    write_report(results.runs, results.about, results.config, results.limits(), args.out)


def _measure_all(args: argparse.Namespace, results: Results) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [run for run in _runs(args) if not results.has(*run)]
    _say_how_long(args, wanted, dict.fromkeys(args.mixes, GUESSED_LIMIT))
    needed = {name for name, *_ in wanted}
    has_peers = any(SYSTEMS[name].is_peer for name in needed)
    peers_python = make_peers_python(args.peers_venv) if has_peers else Path(sys.executable)
    environment = Environment(args.out, args.compile_cache, peers_python, args.flush_interval, args.step_ms / 1000)
    workers = {name: Worker(SYSTEMS[name], environment) for name in args.systems if name in needed}
    with contextlib.ExitStack() as stack:
        for name, worker in workers.items():  # one after another: they measure what work costs as they start
            stack.callback(worker.stop)
            started = time.monotonic()
            _start(worker)
            print(f"{name} is up after {time.monotonic() - started:.0f} s", flush=True)
        said = False
        for name, mix, load, repeat in wanted:
            rate, jobs = None, round(args.limit_jobs * SYSTEMS[name].limit_share)
            if load is not None:
                if not said:
                    _say_how_long(args, [run for run in wanted if not results.has(*run)], results.limits())
                    said = True
                if results.is_hopeless(name, mix, load, repeat):
                    print(f"{repeat} {mix:<6} {load:>9.0f} % {name:<15} not run: beyond its limit", flush=True)
                    continue
                rate, jobs = results.limits()[mix] * load / 100, args.jobs
            arrivals = draw_arrivals(f"{args.seed}-{mix}-{load}-{repeat}", mix, jobs, rate)
            run = measure(workers[name], arrivals, 30 + 3 * jobs / (rate or 1), mix, load, repeat, rate)
            results.add(run)
            print(_line(run), flush=True)
            if run.unfinished:
                workers[name].stop()
                _start(workers[name])


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, str, float | None, int]]:
    """Yield system, mix, load and repeat of every run: the systems take turns, in another order in each repeat."""
    for loads in ([None], sorted(args.loads)):
        for repeat in range(args.repeats):
            first = repeat % len(args.systems)
            for mix in args.mixes:
                for load in loads:
                    for name in [*args.systems[first:], *args.systems[:first]]:
                        if mix in SYSTEMS[name].mixes:
                            yield name, mix, load, repeat


def _start(worker: Worker) -> None:
    """Start a worker and let it serve a few jobs of every kind."""
    worker.start()
    run = measure(worker, draw_arrivals("warm-up", "mixed", 16, None), 120, "mixed")
    if run.failed or run.unfinished:
        raise StartFailed(f"{run.system}: {run.failed} of {run.jobs} first jobs failed, {run.unfinished} never ended")


def _say_how_long(args: argparse.Namespace, wanted: list[Any], limits: Mapping[str, float]) -> None:
    seconds = sum(
        OVERHEAD_S + (args.limit_jobs / limits[mix] if load is None else args.jobs / (limits[mix] * load / 100))
        for _, mix, load, _ in wanted
    )
    text = ", ".join(f"{mix} {limit:.2f} images/s" for mix, limit in limits.items())
    print(f"{len(wanted)} runs, about {seconds / 60:.0f} minutes, with a limit of {text}", flush=True)


def _line(run: Run) -> str:
    load = "all at once" if run.load is None else f"{run.load:.0f} %"
    behind = f"  fell behind: {run.backlog} waited at the last arrival, {run.unfinished} never ended"
    return (
        f"{run.repeat} {run.mix:<6} {load:>11} {run.system:<15} {run.throughput:6.2f} images/s"
        f" ({run.sustained:6.2f} sustained)  mean {run.mean_s:6.2f} s  p99 {run.p99_s:6.2f} s"
        f"  occupancy {100 * run.occupancy:3.0f} %  waste {100 * run.waste:3.0f} %{'' if run.kept_up else behind}"
    )


def _machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores, {model}"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in (*SAME_VERSIONS, "celery")}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=150, help="arrivals in a run (150)")
    parser.add_argument("--limit-jobs", type=int, default=96, help="jobs all at once (96)")
    parser.add_argument("--repeats", type=int, default=3, help="of every run (3)")
    parser.add_argument("--loads", type=float, nargs="+", default=[40, 60, 80, 95], help="percent of the limit")
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--step-ms", type=float, default=0.0, help="of devices of constant speed; 0: as it comes (0)")
    parser.add_argument("--flush-interval", type=float, default=3.0, help="of celery-batches, seconds (3)")
    parser.add_argument("--seed", default="serving", help="any word; of the schedules")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/serving)")
    parser.add_argument("--peers-venv", type=Path, default=ROOT / ".venv-peers", help="folder (.venv-peers)")
    parser.add_argument("--compile-cache", type=Path, default=Path.home() / ".cache" / "sdtpu_worker" / "benchmarks")
    parser.add_argument("--quick", action="store_true", help="one repeat, one load, 24 jobs; replaces what --out has")
    parser.add_argument("--resume", action="store_true", help="skip the runs that --out has")
    parser.add_argument("--plot-only", action="store_true", help="only draw the table and the plot from --out")
    args = parser.parse_args(argv)
    if "ours" not in args.systems:
        parser.error("--systems must have ours: it sets the limit")
    if args.quick:
        args.repeats, args.loads, args.jobs, args.limit_jobs = 1, [60.0], 24, 24
    if args.out is None:
        speed, extent = "-constant-speed" if args.step_ms else "", "-quick" if args.quick else ""
        args.out = ROOT / "benchmarks" / "results" / f"serving{speed}{extent}"
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # for the workers to be ended
    main()
