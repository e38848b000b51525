"""How many hosts a load needs, and what they cost: the real policy in virtual time, with estimated costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning.estimates import Estimate
from sdtpu_worker.planning.simulation import (
    LANE,
    MOST_HOSTS,
    Arrival,
    Outcomes,
    fewest_hosts,
    make_arrivals,
    simulate,
)

_TICK_S = 0.1
_OVERHEAD_S = 0.02
_FEWEST_JOBS, _MOST_JOBS = 500, 10_000
_LIVES = 20
_MOST_LOAD = 0.95
"""Of what hosts can do, the most that they are planned for."""


def hosts_for_load(
    setting: Estimate, jobs_per_hour: float, steps: Sequence[int], p99_s: float, chips: int, price: float | None
) -> dict[str, Any]:
    """Simulate hosts that share one queue, and return the fewest that serve a load.

    Args:
        setting: of every host.
        jobs_per_hour: on average; jobs come as a Poisson process.
        steps: numbers of denoising steps, drawn with equal chances.
        p99_s: seconds that 99 of 100 jobs may take at most.
        chips: of a host.
        price: of a chip for an hour, in any currency; None if it is not known.

    Raises:
        ConfigurationError: no number of hosts is enough.
    """
    alone_s = setting.latency_s(max(steps))
    if alone_s + _OVERHEAD_S > p99_s:
        raise ConfigurationError(
            f"--p99 must be more than {alone_s:.1f} s, which a job of {max(steps)} steps takes alone with"
            f" {setting.slots} slots per device, got {p99_s:g}; fewer slots per device make a job faster"
        )
    rate = jobs_per_hour / 3600
    mean_images_per_s = setting.images_per_s(round(sum(steps) / len(steps)))
    # A queue near the limit grows for longer than any simulation runs.
    most_per_s = _MOST_LOAD * mean_images_per_s
    if rate > MOST_HOSTS * most_per_s:
        raise ConfigurationError(
            f"--load must be one that {MOST_HOSTS} hosts serve, at most {MOST_HOSTS * most_per_s * 3600:.0f} jobs per"
            f" hour, got {jobs_per_hour:g}; plan for a part of it"
        )
    # Of a load that would need too many jobs to fill its hosts, a part is simulated: parts with queues of their own
    # need no fewer hosts than one queue for all.
    parts = max(1.0, _LIVES * alone_s * rate / _MOST_JOBS)
    count = int(min(max(_FEWEST_JOBS, _LIVES * alone_s * rate), _MOST_JOBS))
    arrivals = make_arrivals("poisson", rate / parts, count, steps)
    of_part, done = _simulate(setting, arrivals, p99_s, math.ceil(rate / parts / most_per_s))
    if of_part is None or done is None:
        raise ConfigurationError(
            f"--load: not even {MOST_HOSTS} hosts serve {jobs_per_hour:g} jobs per hour within --p99 {p99_s:g} s"
        )
    found = math.ceil(of_part * parts)
    cost = None if price is None else found * chips * price
    return {
        "kind": "simulated",
        "jobs_per_hour": jobs_per_hour,
        "steps": list(steps),
        "p99_limit_s": p99_s,
        "slots_per_device": setting.slots,
        "simulated_jobs": count,
        "hosts": found,
        "chips": found * chips,
        "simulated_hosts": of_part,
        "mean_s": round(done.mean_s, 3),
        "p99_s": round(done.percentile_s(99), 3),
        "utilisation": round(rate / (found * mean_images_per_s), 3),
        "cost_per_hour": cost,
        "cost_per_1000_images": None if cost is None else round(1000 * cost / jobs_per_hour, 4),
    }


def _simulate(
    setting: Estimate, arrivals: Sequence[Arrival], p99_s: float, least: int
) -> tuple[int | None, Outcomes | None]:
    """Return the fewest hosts, from a least number on, that serve jobs in time, and how they do; None if none do."""
    costs = TickCosts(setting.num_devices, setting.cost)

    def policy(costs: TickCosts) -> Aggregator:
        return Aggregator({LANE: costs}, setting.slots, phases_per_tick(setting.slots), _TICK_S)

    seen: dict[int, Outcomes] = {}

    def enough(hosts: int) -> bool:
        if hosts not in seen:
            seen[hosts] = simulate(arrivals, policy, costs, hosts, setting.slots, overhead_s=_OVERHEAD_S)
        return seen[hosts].percentile_s(99) <= p99_s

    found = fewest_hosts(enough, least)
    return found, None if found is None else seen[found]
