"""A pool of hosts in virtual time: the real policies, the loop's dispatch rules, measured costs; no devices, no clock.

What it keeps of the real thing: one queue that hosts take from in turn, as long as they hold less than their limit
(Redis serves the worker that has asked for longest); two ticks in flight, the second dispatched shortly before the
first is expected to end; a tick that lasts as long as its busiest device; pictures that come out when their tick ends.
What it leaves out: everything that fails, and the host's own work, for which `overhead_s` stands.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Plan
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY
from sdtpu_worker.device_loop.protocols import Policy
from sdtpu_worker.device_loop.ticks_in_flight import MAX_TICKS_IN_FLIGHT, dispatch_lead_s

LANE: Lane = (0, 0)
MOST_HOSTS = 1000


@dataclass(frozen=True)
class Arrival:
    """One job: when its client sends it, seconds, and what it asks for."""

    at_s: float
    num_steps: int
    priority: int = DEFAULT_PRIORITY


@dataclass(frozen=True)
class Outcomes:
    """What became of the jobs.

    Attributes:
        latencies_s: from the client's call to the result, in the order of the arrivals.
        elapsed_s: from the first arrival to the last result.
        occupancy: share of the slots in use while a host has work.
        waste: share of the denoising steps that made no picture better (slots that were empty or done).
    """

    arrivals: Sequence[Arrival]
    latencies_s: Sequence[float]
    elapsed_s: float
    occupancy: float
    waste: float

    @property
    def throughput(self) -> float:
        """Images per second."""
        return len(self.latencies_s) / self.elapsed_s

    @property
    def mean_s(self) -> float:
        """The mean latency."""
        return sum(self.latencies_s) / len(self.latencies_s)

    def of_priority(self, priority: int | None) -> list[float]:
        """Return the latencies of one priority, or all."""
        return [
            latency
            for arrival, latency in zip(self.arrivals, self.latencies_s, strict=True)
            if priority is None or arrival.priority == priority
        ]

    def percentile_s(self, percent: float, priority: int | None = None) -> float:
        """Return a percentile of the latencies (of one priority), by nearest rank."""
        chosen = sorted(self.of_priority(priority))
        return chosen[max(0, math.ceil(len(chosen) * percent / 100) - 1)]


def make_arrivals(
    process: str,
    rate: float,
    count: int,
    mix: Sequence[int],
    priorities: Sequence[int] = (DEFAULT_PRIORITY,),
    seed: int = 0,
) -> list[Arrival]:
    """Draw jobs.

    Args:
        process: `all-at-once`, `poisson`, or `bursty` (a Poisson process of bursts of 1 to 31 jobs, 16 on average).
        rate: jobs per second.
        count: how many.
        mix: numbers of steps, drawn with equal chances.
        priorities: likewise.
        seed: the same seed draws the same jobs.

    Raises:
        ValueError: the process is not one of these.
    """
    draw = random.Random(seed)
    at_s, times = 0.0, list[float]()
    while len(times) < count:
        if process == "all-at-once":
            times.append(0.0)
        elif process == "poisson":
            at_s += draw.expovariate(rate)
            times.append(at_s)
        elif process == "bursty":
            at_s += draw.expovariate(rate / 16)
            times += [at_s] * min(draw.randint(1, 31), count - len(times))
        else:
            raise ValueError(f"arrivals must be all-at-once, poisson or bursty, got {process!r}")
    return [Arrival(at_s, draw.choice(mix), draw.choice(priorities)) for at_s in times]


@dataclass
class _Dispatched:
    plan: Plan
    started_at: float
    ends_at: float


@dataclass
class _Host:
    policy: Any
    costs: TickCosts  # the truth; the policy has a copy that it learns on
    limit: int
    held: int = 0
    in_flight: deque[_Dispatched] = field(default_factory=deque)
    due_at: float = math.inf
    active_since: float = 0.0
    active_s: float = 0.0
    occupied_slot_s: float = 0.0
    slot_steps: int = 0


def simulate(
    arrivals: Sequence[Arrival],
    make_policy: Callable[[TickCosts], Policy],
    costs: TickCosts,
    hosts: int = 1,
    slots_per_device: int = 1,
    batches_held: int = 2,
    overhead_s: float = 0.0,
) -> Outcomes:
    """Run jobs through a pool of hosts until the last is done.

    Args:
        arrivals: in order of time.
        make_policy: makes one host's policy; it may keep and change the costs that it gets.
        costs: what ticks really take.
        hosts: how many hosts consume the queue.
        slots_per_device: rows of one device's batch.
        batches_held: how many batches of jobs a host takes from the queue; more only for jobs that are more urgent
            than one of its running ones.
        overhead_s: client, Redis, encoding and storing, added to every job.
    """
    num_slots = costs.num_devices * slots_per_device
    pool = [
        _Host(make_policy(TickCosts.from_json(costs.to_json())), costs, batches_held * num_slots) for _ in range(hosts)
    ]
    asking = deque(pool)  # the hosts that may take more, in the order in which they asked
    queue: list[tuple[int, int]] = []  # (priority, number of the arrival)
    done_at = [math.nan] * len(arrivals)
    order = itertools.count()
    events: list[tuple[float, int, str, Any]] = [
        (arrival.at_s, next(order), "arrival", i) for i, arrival in enumerate(arrivals)
    ]

    def at(time_s: float, what: str, subject: Any) -> None:
        heapq.heappush(events, (time_s, next(order), what, subject))

    def give(host: _Host, now: float) -> None:
        _, i = heapq.heappop(queue)
        if not host.held:
            host.active_since = now
        host.held += 1
        host.policy.add(str(i), LANE, arrivals[i].num_steps, now, Terms(priority=arrivals[i].priority))
        schedule(host, now)

    def hand_out(now: float) -> None:
        while queue and asking:
            host = asking.popleft()
            give(host, now)
            if host.held < host.limit:
                asking.append(host)
        if queue and queue[0][0] < DEFAULT_PRIORITY:  # urgent jobs do not stop at the limit
            for host in pool:
                lowest = host.policy.lowest_priority_running()
                while queue and lowest is not None and queue[0][0] < lowest and host.held < host.limit + num_slots:
                    give(host, now)

    def schedule(host: _Host, now: float) -> None:
        if len(host.in_flight) >= MAX_TICKS_IN_FLIGHT:
            return
        due_at = now
        if host.in_flight:
            running = host.in_flight[0]
            expected_s = host.policy.expected_s(running.plan)
            due_at = max(now, running.started_at + expected_s - dispatch_lead_s(expected_s))
        if due_at < host.due_at:
            host.due_at = due_at
            at(due_at, "due", host)

    def dispatch(host: _Host, now: float) -> None:
        plan = host.policy.plan(now)
        if plan is None:
            return
        started_at = max(now, host.in_flight[-1].ends_at) if host.in_flight else now
        tick = _Dispatched(plan, started_at, started_at + costs.tick_s(plan))
        host.in_flight.append(tick)
        host.slot_steps += slots_per_device * sum(phase.steps for phases in plan.devices for phase in phases)
        host.occupied_slot_s += plan.occupied * (tick.ends_at - started_at)
        at(tick.ends_at, "end", host)
        schedule(host, now)

    def end(host: _Host, now: float) -> None:
        tick = host.in_flight.popleft()
        host.policy.update(Outcome(tick.plan, now - tick.started_at))
        for *_, task_id in tick.plan.decoded():
            done_at[int(task_id)] = now + overhead_s
            host.held -= 1
            if host.held == host.limit - 1:
                asking.append(host)
            if not host.held:
                host.active_s += now - host.active_since
        hand_out(now)
        schedule(host, now)

    while events:
        now, _, what, subject = heapq.heappop(events)
        if what == "arrival":
            heapq.heappush(queue, (arrivals[subject].priority, subject))
            hand_out(now)
        elif what == "end":
            end(subject, now)
        elif now == subject.due_at:
            subject.due_at = math.inf
            dispatch(subject, now)

    slot_s = sum(host.active_s for host in pool) * num_slots
    slot_steps = sum(host.slot_steps for host in pool)
    return Outcomes(
        arrivals=arrivals,
        latencies_s=[end_s - arrival.at_s for end_s, arrival in zip(done_at, arrivals, strict=True)],
        elapsed_s=max(done_at) - arrivals[0].at_s,
        occupancy=sum(host.occupied_slot_s for host in pool) / slot_s,
        waste=1 - sum(arrival.num_steps for arrival in arrivals) / slot_steps,
    )


def fewest_hosts(enough: Callable[[int], bool], least: int) -> int | None:
    """Return the smallest count from `least` to `MOST_HOSTS` that is enough, by doubling and bisection."""
    low, high = least - 1, least
    while not enough(high):
        if high >= MOST_HOSTS:
            return None
        low, high = high, min(2 * high, MOST_HOSTS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
