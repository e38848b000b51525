"""How many hosts a load needs, and what they cost: the real policy in virtual time, with estimated costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning.estimates import Estimate
from sdtpu_worker.planning.simulation import LANE, MOST_HOSTS, fewest_hosts, make_arrivals, simulate

_TICK_S = 0.1
_OVERHEAD_S = 0.02
_FEWEST_JOBS, _MOST_JOBS = 500, 5000
_LIVES = 20


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
    count = int(min(max(_FEWEST_JOBS, _LIVES * alone_s * rate), _MOST_JOBS))
    arrivals = make_arrivals("poisson", rate, count, steps)
    costs = TickCosts(setting.num_devices, setting.cost)

    def policy(costs: TickCosts) -> Aggregator:
        return Aggregator({LANE: costs}, setting.slots, phases_per_tick(setting.slots), _TICK_S)

    seen = {}

    def enough(hosts: int) -> bool:
        if hosts not in seen:
            done = simulate(arrivals, policy, costs, hosts, setting.slots, overhead_s=_OVERHEAD_S)
            seen[hosts] = done
        return seen[hosts].percentile_s(99) <= p99_s

    mean_images_per_s = setting.images_per_s(round(sum(steps) / len(steps)))
    # Fewer hosts than that have a queue that grows for ever, which a short simulation does not show.
    found = fewest_hosts(enough, least=int(rate / mean_images_per_s) + 1)
    if found is None:
        raise ConfigurationError(f"--load: not even {MOST_HOSTS} hosts serve {jobs_per_hour:g} jobs per hour")
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
        "mean_s": round(seen[found].mean_s, 3),
        "p99_s": round(seen[found].percentile_s(99), 3),
        "utilisation": round(rate / (found * mean_images_per_s), 3),
        "cost_per_hour": cost,
        "cost_per_1000_images": None if cost is None else round(1000 * cost / jobs_per_hour, 4),
    }
