"""What the simulator says of the runs of `serving.py`: the same schedules, the same policies, in virtual time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.serving_load import draw_arrivals
from benchmarks.serving_run import Run
from benchmarks.serving_systems import DECODE_STEPS, DEVICES, INSERT_STEPS, SYSTEMS
from benchmarks.simulate import COSTS, POLICIES, Pool
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.planning.simulation import Arrival, Outcomes

_POLICIES = dict(zip(("ours", "fixed-bucketed", "fixed-mixed"), POLICIES, strict=True))


def simulated_lines(runs: Sequence[Run], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of measured and simulated latencies: medians over the repeats."""
    costs = costs_of(config["step_ms"])
    pairs: dict[tuple[str, float, str], list[tuple[Run, Outcomes]]] = defaultdict(list)
    for run in runs:
        if run.load is not None and run.system in _POLICIES:
            pairs[run.mix, run.load, run.system].append((run, again(run, config, costs)))
    yield "### Measured and simulated"
    yield ""
    yield "| | load | system | mean, s | simulated | ratio | p99, s | simulated | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (mix, load, system), found in pairs.items():
        cells = []
        for measured, theory in (
            ([run.mean_s for run, _ in found], [done.mean_s for _, done in found]),
            ([run.p99_s for run, _ in found], [done.percentile_s(99) for _, done in found]),
        ):
            cells += [f"{median(measured):.2f}", f"{median(theory):.2f}", f"{median(measured) / median(theory):.2f}"]
        yield f"| {mix} | {load:.0f} % | {SYSTEMS[system].label} | {' | '.join(cells)} |"
    yield ""


def again(run: Run, config: Mapping[str, Any], costs: TickCosts) -> Outcomes:
    """Simulate a run."""
    orders = draw_arrivals(f"{config['seed']}-{run.mix}-{run.load}-{run.repeat}", run.mix, run.jobs, run.rate)
    arrivals = [Arrival(order.at_s, order.num_inference_steps) for order in orders]
    return Pool(costs, _POLICIES[run.system]).serve(arrivals)


def costs_of(step_ms: float) -> TickCosts:
    """Return the costs of devices of constant speed, or those that `benchmarks/engine.py` measured (0)."""
    if not step_ms:
        return TickCosts.from_json(json.loads(COSTS.read_text()))
    step_s = step_ms / 1000
    return TickCosts(DEVICES, Cost(step_s, INSERT_STEPS * step_s, DECODE_STEPS * step_s))
