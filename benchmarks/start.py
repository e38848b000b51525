"""How long a worker takes from its process' start to its first message: cold, warm, and with programs made ahead.

    python benchmarks/start.py [--rounds 3] [--devices 8] [--slots-per-device 4] [--resolutions 64x64,64x96,96x64]

Needs `pip install -e '.[demo]'`. Each round starts a real worker process three times: `cold` with an empty
`sdtpu_compile_cache`, `warm` with the one that the cold start filled, and `ahead` with an empty one and the programs
that `sdtpu compile` has put into `sdtpu_programs`; about two minutes a round on two CPU cores, where the devices are
simulated. Prints medians of all rounds in seconds: from the start of the process to the moment when it says that it
takes jobs, the phases that `sdtpu_start_seconds` has, and the seconds of a CPU that the process took, which other load
on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env

TOTAL, CPU = "process start to ready", "of a CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--slots-per-device", type=int, default=4)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--resolutions", default="", help="as sdtpu_resolutions (the model's own)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "ahead": []}
    with private_redis() as url:
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                settings = {
                    "SDTPU_MODEL": args.model,
                    "SDTPU_PLATFORM": "cpu",
                    "SDTPU_CPU_DEVICES": str(args.devices),
                    "SDTPU_SLOTS_PER_DEVICE": str(args.slots_per_device),
                    "SDTPU_RESOLUTIONS": args.resolutions,
                    "SDTPU_COMPILE_CACHE": str(Path(folder, "cache")),
                }
                ahead = {**settings, "SDTPU_COMPILE_CACHE": str(Path(folder, "empty")),
                         "SDTPU_PROGRAMS": str(Path(folder, "programs"))}  # fmt: skip
                for kind, of_kind in times.items():
                    env = worker_env(url, **(ahead if kind == "ahead" else settings))
                    if kind == "ahead":
                        subprocess.run(
                            [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "compile"],
                            env=env, check=True, capture_output=True,
                        )  # fmt: skip
                    of_kind.append(start(Path(folder, f"{kind}.log"), env))
    medians = {kind: medians_of(of_kind) for kind, of_kind in times.items()}
    print(f"{'phase':<26}" + "".join(f"{kind:>8}" for kind in medians))
    for phase in medians["cold"]:
        print(f"{phase:<26}" + "".join(f"{of_kind[phase]:>8.2f}" for of_kind in medians.values()))
    ratios = {kind: shares(times[kind], times["cold"]) for kind in ("warm", "ahead")}
    for kind, each in ratios.items():
        print(f"{kind} / cold: {statistics.median(each):.1%} ({min(each):.1%} to {max(each):.1%})")
    if args.json:
        args.json.write_text(json.dumps({**medians, "ratios": ratios}, indent=1) + "\n")


def shares(times: list[dict[str, float]], of: list[dict[str, float]]) -> list[float]:
    """Return for each round the share that one start takes of another."""
    return [one[TOTAL] / other[TOTAL] for one, other in zip(times, of, strict=True)]


def start(log: Path, env: dict[str, str]) -> dict[str, float]:
    """Start a worker and stop it; return its seconds by phase, and in total."""
    command = worker_command("sdtpu_worker.app")
    started = time.monotonic()
    with running(command, log, {**env, "SDTPU_HEALTH_ADDRESS": "127.0.0.1:0"}) as process:
        address = wait_for_line(process, log, "health: http", 120).partition("http://")[2].split()[0]
        phases: dict[str, float] = {}
        total, cpu_s = None, 0.0
        while total is None:
            page = urlopen(f"http://{address}/metrics", timeout=10).read().decode()
            families = {family.name: family for family in text_string_to_metric_families(page)}
            if families["sdtpu_worker_ready"].samples[0].value == 1:
                total = time.monotonic() - started
            cpu_s = families["process_cpu_seconds"].samples[0].value
            phases = {each.labels["phase"]: each.value for each in families["sdtpu_start_seconds"].samples}
            time.sleep(0.1)  # a page takes time from the worker
    return {**phases, TOTAL: total, CPU: cpu_s}


def medians_of(times: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each phase."""
    return {phase: statistics.median(each[phase] for each in times) for phase in times[0]}


if __name__ == "__main__":
    main()
