"""The policy in virtual time: how long jobs wait, at which load, with how many hosts.

    python benchmarks/simulate.py curves --plot curves.png
    python benchmarks/simulate.py run --arrivals bursty --load 0.8 --mix 10,20,30,50 --priorities 0,6,6,6
    python benchmarks/simulate.py hosts --rate 100 --p99 2.5 --plot hosts.png

`curves` compares step-level batching with fixed full-trajectory batches over the load; `run` shows one case; `hosts`
finds the fewest hosts for a rate of jobs and a 99th percentile of their latency. Costs come from `--costs`, a file
that `benchmarks/engine.py --json` wrote or `celery inspect stats` shows (`pool.sdtpu.costs`); default: eight simulated
devices on two cores of a CPU, which slow each other down. `--independent` leaves that slowdown out, as devices with
silicon of their own. Needs `pip install -e '.[bench]'`; the rules of the simulation are in
`sdtpu_worker/planning/simulation.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fixed_policy import BATCHES_HELD, FixedBatches
from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY
from sdtpu_worker.planning.simulation import (
    LANE,
    MOST_HOSTS,
    Arrival,
    Outcomes,
    fewest_hosts,
    make_arrivals,
    simulate,
)

COSTS = Path(__file__).with_name("costs.json")
LOADS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MIXES = {"all 30 steps": (30,), "10, 20, 30, 50 steps mixed": (10, 20, 30, 50)}
OVERHEAD_S = 0.02
POLICIES = ("step-level", "fixed, bucketed", "fixed, mixed")


class Pool:
    """Hosts of one kind under one policy; `serve` runs jobs through them.

    Args:
        costs: what ticks take.
        policy: one of `POLICIES`.
        slots: of each device.
        tick_s: `sdtpu_tick_s`.
        overhead_s: client, Redis, PNG and store, each job.
    """

    def __init__(
        self,
        costs: TickCosts,
        policy: str = POLICIES[0],
        slots: int = 1,
        tick_s: float = 0.1,
        overhead_s: float = OVERHEAD_S,
    ) -> None:
        self.costs, self.policy, self.slots, self.tick_s, self.overhead_s = costs, policy, slots, tick_s, overhead_s

    @classmethod
    def of(cls, args: argparse.Namespace, policy: str = POLICIES[0]) -> Pool:
        """Return what the command line describes."""
        return cls(args.costs, policy, args.slots_per_device, args.tick, args.overhead)

    def serve(self, arrivals: Sequence[Arrival], hosts: int = 1) -> Outcomes:
        """Simulate."""
        held = 2 if self.policy == "step-level" else BATCHES_HELD
        return simulate(arrivals, self._make, self.costs, hosts, self.slots, held, self.overhead_s)

    def limit(self, mix: Sequence[int]) -> float:
        """Return the images per second of one host that always has jobs."""
        count = 50 * self.costs.num_devices * self.slots
        return self.serve(make_arrivals("all-at-once", 1.0, count, mix)).throughput

    def _make(self, costs: TickCosts) -> Any:
        phases = phases_per_tick(self.slots)
        if self.policy == "step-level":
            return Aggregator({LANE: costs}, self.slots, phases, self.tick_s)
        return FixedBatches({LANE: costs}, self.slots, phases, bucketed=self.policy == "fixed, bucketed")


def run(args: argparse.Namespace) -> None:
    """Show one case."""
    pool = Pool.of(args, args.policy)
    limit = pool.limit(args.mix)
    rate = args.rate or limit * args.load * args.hosts
    done = pool.serve(make_arrivals(args.arrivals, rate, args.jobs, args.mix, args.priorities, args.seed), args.hosts)
    print(f"{args.jobs} jobs, {args.arrivals}, {rate:.2f}/s on {args.hosts} hosts with a limit of {limit:.2f}/s each")
    print(f"throughput {done.throughput:.2f}/s, occupancy {done.occupancy:.0%}, waste {done.waste:.1%}")
    print(HEADER)
    print(_row("all", done))
    if len(set(args.priorities)) > 1:
        for priority in sorted(set(args.priorities)):
            print(_row(f"priority {priority}", done, priority))


def curves(args: argparse.Namespace) -> None:
    """Compare the policies over the load."""
    results: dict[str, dict[str, list[Outcomes]]] = {}
    for name, mix in MIXES.items():
        limit = Pool.of(args).limit(mix)
        policies = POLICIES if len(mix) > 1 else POLICIES[:2]  # bucketed and mixed are the same for one length
        print(f"{name}; the limit is {limit:.2f} images/s\n{HEADER}")
        results[name] = {policy: [] for policy in policies}
        for load in LOADS:
            arrivals = make_arrivals("poisson", load * limit, args.jobs, mix, seed=args.seed)
            for policy in policies:
                done = Pool.of(args, policy).serve(arrivals)
                results[name][policy].append(done)
                print(_row(f"{load:.0%} {policy}", done))
    if args.plot:
        _plot_curves(args.plot, results)


def hosts(args: argparse.Namespace) -> None:
    """Find the fewest hosts for a rate and a 99th percentile."""
    pool = Pool.of(args)
    arrivals = make_arrivals(args.arrivals, args.rate, args.jobs, args.mix, args.priorities, args.seed)
    seen: dict[int, float] = {}

    def enough(count: int) -> bool:
        if count not in seen:
            seen[count] = pool.serve(arrivals, count).percentile_s(99)
            print(f"{count} hosts: p99 {seen[count]:.2f} s", flush=True)
        return seen[count] <= args.p99

    fewest = fewest_hosts(enough, least=max(1, int(args.rate / pool.limit(args.mix))))
    if args.plot:
        _plot_hosts(args.plot, seen, args)
    if fewest is None:
        raise SystemExit(f"not even {MOST_HOSTS} hosts serve {args.rate:g} jobs/s with a p99 of {args.p99:g} s")
    print(f"{fewest} hosts serve {args.rate:g} jobs/s with a p99 of {seen[fewest]:.2f} s (wanted: {args.p99:g} s)")


HEADER = f"{'':<28}{'mean':>8}{'p50':>8}{'p95':>8}{'p99':>8}  s"


def _row(name: str, done: Outcomes, priority: int | None = None) -> str:
    chosen = done.of_priority(priority)
    figures = [sum(chosen) / len(chosen), *(done.percentile_s(p, priority) for p in (50, 95, 99))]
    return f"{name:<28}" + "".join(f"{figure:>8.3f}" for figure in figures)


def _plot_curves(path: Path, results: Mapping[str, Mapping[str, Sequence[Outcomes]]]) -> None:
    plt = _matplotlib()
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), sharey=True, squeeze=False)
    for axis, (name, policies) in zip(axes[0], results.items(), strict=True):
        for (policy, runs), colour in zip(policies.items(), ("C0", "C1", "C2"), strict=False):
            loads = [100 * load for load in LOADS]
            axis.plot(loads, [done.mean_s for done in runs], colour, marker="o", label=f"{policy}: mean")
            axis.plot(loads, [done.percentile_s(99) for done in runs], colour, ls="--", marker=".", label="p99")
        axis.set(title=name, xlabel="load, % of the limit", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0][0].set_ylabel("latency, s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def _plot_hosts(path: Path, seen: Mapping[int, float], args: argparse.Namespace) -> None:
    plt = _matplotlib()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    counts = sorted(seen)
    axis.plot(counts, [seen[count] for count in counts], marker="o")
    axis.axhline(args.p99, color="C3", ls="--", label=f"wanted: {args.p99:g} s")
    axis.set(title=f"{args.rate:g} jobs/s, {args.arrivals}", xlabel="hosts", ylabel="p99, s", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def _matplotlib() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{run,curves,hosts}")
    for command in (run, curves, hosts):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--costs", type=Path, default=COSTS, help="JSON file; default: eight simulated devices")
        sub.add_argument("--independent", action="store_true", help="devices do not slow each other down")
        sub.add_argument("--slots-per-device", type=int, default=1)
        sub.add_argument("--tick", type=float, default=0.1, help="sdtpu_tick_s")
        sub.add_argument(
            "--overhead", type=float, default=OVERHEAD_S, help="client, Redis, PNG and store, seconds a job"
        )
        sub.add_argument("--jobs", type=int, default=2000)
        sub.add_argument("--seed", type=int, default=0)
        if command is not run:
            sub.add_argument("--plot", type=Path, help="PNG file to draw")
        if command is not curves:
            sub.add_argument("--arrivals", choices=("all-at-once", "poisson", "bursty"), default="poisson")
            sub.add_argument("--mix", type=_integers, default=(10, 20, 30, 50), help="numbers of steps, like 10,20,30")
            sub.add_argument("--priorities", type=_integers, default=(DEFAULT_PRIORITY,), help="drawn, like 0,6,6,9")
        if command is run:
            sub.add_argument("--policy", choices=POLICIES, default=POLICIES[0])
            sub.add_argument("--hosts", type=int, default=1)
            sub.add_argument("--load", type=float, default=0.8, help="share of the hosts' limit")
            sub.add_argument("--rate", type=float, help="jobs per second, instead of --load")
        if command is hosts:
            sub.add_argument("--rate", type=float, required=True, help="jobs per second")
            sub.add_argument("--p99", type=float, required=True, help="seconds that 99 of 100 jobs may take at most")
    args = parser.parse_args(argv)
    try:
        data = json.loads(args.costs.read_text())
        args.costs = TickCosts.from_json(next(iter(data.values())) if "step_s" not in data else data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        parser.error(f"--costs must be a file that benchmarks/engine.py --json wrote, got {args.costs}: {exc}")
    if args.independent:
        args.costs = TickCosts(args.costs.num_devices, args.costs.cost, None, args.costs.overhead_s)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    args.command(args)


if __name__ == "__main__":
    main()
