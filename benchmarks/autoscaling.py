"""The shipped scaling rule, over days of jobs: what waits, what is lost, and what the hosts cost.

    python benchmarks/autoscaling.py
    python benchmarks/autoscaling.py --manifest my-scaled-object.yaml --cold 600 --days 5

plays three days of 110,000 jobs each, with a night, an afternoon and bursts, under the ScaledObject of
`deploy/kubernetes/components/keda`: hosts from none to ten, that take minutes to start and are preempted with notice
and without. It prints a table for docs/measurements.md, which has what it showed. Half a minute of one core; the same
figures on every machine. Needs `pip install -e '.[test]'`. The rules are in `autoscaling_rule.py`,
`autoscaling_hosts.py` and `autoscaling_day.py`; what a host is and how long it takes to start are assumptions, which
the options change.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.autoscaling_day import Day, Figures, draw_day, figures_of, oracle
from benchmarks.autoscaling_hosts import Hardware, Job, Preemptions
from benchmarks.autoscaling_rule import MANIFEST, ScalingRule

NEVER, NOW_AND_THEN, OFTEN = Preemptions(), Preemptions(4 * 3600), Preemptions(1800)
AFTERNOON = (14 * 3600.0, 15 * 3600.0)
COUNTS = ("host_hours", "idle_hours", "starts", "stops", "deaths", "handed_over", "redelivered")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    preemptions: Preemptions = NEVER
    blind: tuple[float, float] = (0.0, 0.0)
    counts_held: bool = True
    start_factor: float = 1.0


CASES = (
    Case("as shipped, hosts stay"),
    Case("as shipped, a host lives 4 h on average", NOW_AND_THEN),
    Case("as shipped, a host lives 30 min on average", OFTEN),
    Case("as shipped, 4 h, and starts take twice as long", NOW_AND_THEN, start_factor=2.0),
    Case("as shipped, 4 h, and Prometheus is away from 14 to 15 h", NOW_AND_THEN, blind=AFTERNOON),
    Case("for comparison: a trigger on what waits alone, 4 h", NOW_AND_THEN, counts_held=False),
)


def together(days: Sequence[tuple[Sequence[Job], Figures]]) -> Figures:
    """Return the figures of all days: percentiles over all jobs, all else as a mean over the days."""
    jobs = [job for each, _ in days for job in each]
    means = {name: sum(getattr(figures, name) for _, figures in days) / len(days) for name in COUNTS}
    return figures_of(jobs, most_hosts=max(figures.most_hosts for _, figures in days), **means)


def play(case: Case, rule: ScalingRule, hardware: Hardware, seeds: Sequence[int], scale: float) -> Figures:
    """Play a case."""
    slower = dataclasses.replace(
        hardware, cold_s=hardware.cold_s * case.start_factor, warm_s=hardware.warm_s * case.start_factor
    )
    days = []
    for seed in seeds:
        day = Day(rule, slower, case.preemptions, seed, scale, case.blind, case.counts_held)
        days.append((day.jobs, day.run()))
    return together(days)


def play_oracle(rule: ScalingRule, hardware: Hardware, seeds: Sequence[int], scale: float) -> Figures:
    """Have the oracle serve the same days."""
    days = []
    for seed in seeds:
        jobs = draw_day(seed, scale)
        days.append((jobs, oracle(jobs, hardware, rule.most)))
    return together(days)


HEADER = (
    "| | lost | failed | wait p50 | p95 | p99 | longest | host hours | of the oracle's | started | drained | died |"
    " handed over | redelivered |"
)


def row(name: str, figures: Figures, best: Figures) -> str:
    """Return a line of the table: seconds, and counts a day."""
    waits = (figures.wait_p50_s, figures.wait_p95_s, figures.wait_p99_s, figures.wait_max_s)
    cells = [
        name, f"{figures.lost}", f"{figures.failed}", *(f"{wait:.0f} s" for wait in waits),
        f"{figures.host_hours:.1f}", f"{figures.host_hours / best.host_hours:.2f}",
        *(f"{getattr(figures, count):.0f}" for count in COUNTS[2:]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    defaults = Hardware()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="a ScaledObject; default: the shipped one")
    parser.add_argument("--days", type=int, default=3, help="how many, each from a seed of its own")
    parser.add_argument("--scale", type=float, default=1.0, help="of the load")
    parser.add_argument("--cold", type=float, default=defaults.cold_s, help="seconds to start on a new machine")
    parser.add_argument("--warm", type=float, default=defaults.warm_s, help="seconds to start on one that is there")
    parser.add_argument("--slots", type=int, default=defaults.slots, help="slots of a host")
    parser.add_argument("--step", type=float, default=defaults.step_s, help="seconds of a denoising step")
    args = parser.parse_args(argv)
    rule = ScalingRule.of_manifest(args.manifest)
    hardware = Hardware(slots=args.slots, step_s=args.step, cold_s=args.cold, warm_s=args.warm)
    seeds = range(args.days)
    best = play_oracle(rule, hardware, seeds, args.scale)
    print(f"{best.jobs:,} jobs in {args.days} days; at most {rule.most} hosts of {hardware.slots} slots", flush=True)
    print(f"{HEADER}\n|{'---|' * HEADER.count(' |')}\n{row('oracle', best, best)}", flush=True)
    for case in CASES:
        print(row(case.name, play(case, rule, hardware, seeds, args.scale), best), flush=True)


if __name__ == "__main__":
    main()
