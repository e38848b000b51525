"""A day of jobs under the autoscaler, and under an oracle that knows the day beforehand.

The oracle has every host ready when it is needed: its jobs wait no longer than they would if the largest number of
hosts stood ready all day. It pays the same start-up time for each host that it starts, and leaves a host on through a
gap that is shorter than a start. It loses no host.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.autoscaling_hosts import Fleet, Hardware, Job, Preemptions
from benchmarks.autoscaling_rule import HPA_PERIOD_S, Autoscaler, ScalingRule, grace_s, scrape_interval_s

DAY_S = 86_400.0
MIX = (10, 20, 30, 50)
NIGHT_PER_S, PEAK_PER_S = 1 / 600, 4.0
BURSTS, BURST_JOBS, BURST_S = 12, (50, 300), 30.0


@dataclass(frozen=True)
class Figures:
    """What a day cost, and what its jobs got.

    Attributes:
        jobs, lost, failed: how many; lost are those that never came to an end.
        wait_p50_s, wait_p95_s, wait_p99_s, wait_max_s: from the client's call to the job's first slot.
        host_hours: from the decision to start a host until it is gone.
        idle_hours: of machines that stay for a while after their worker, in case there is another one.
        most_hosts: at one time.
        starts, stops, deaths: of hosts; stops are drains.
        handed_over, redelivered: jobs of hosts that stopped, and of hosts that died.
    """

    jobs: int
    lost: int
    failed: int
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    wait_max_s: float
    host_hours: float
    idle_hours: float = 0.0
    most_hosts: int = 0
    starts: int = 0
    stops: int = 0
    deaths: int = 0
    handed_over: int = 0
    redelivered: int = 0


def rate_at(time_s: float) -> float:
    """Return the jobs per second at a time of the day: least at four in the night, most twelve hours later."""
    height = (1 - math.cos(2 * math.pi * (time_s / DAY_S - 4 / 24))) / 2
    return NIGHT_PER_S + PEAK_PER_S * height**3


def draw_day(seed: int, scale: float = 1.0) -> list[Job]:
    """Draw the jobs of a day: a Poisson process that follows `rate_at`, with bursts at any hour.

    Args:
        seed: the same seed draws the same day.
        scale: of the rates and the bursts.
    """
    draw = random.Random(seed)
    most = (NIGHT_PER_S + PEAK_PER_S) * scale
    times, at_s = list[float](), draw.expovariate(most)
    while at_s < DAY_S:
        if draw.random() * most < rate_at(at_s) * scale:
            times.append(at_s)
        at_s += draw.expovariate(most)
    for _ in range(BURSTS):
        begin_s = draw.uniform(0, DAY_S - BURST_S)
        times += [begin_s + draw.uniform(0, BURST_S) for _ in range(int(draw.randint(*BURST_JOBS) * scale))]
    return [Job(at_s, draw.choice(MIX)) for at_s in sorted(times)]


class Day:
    """One day: jobs that come, hosts that serve them, and the autoscaler that sees what Prometheus has scraped.

    Args:
        rule: of the autoscaler.
        hardware: of the hosts.
        preemptions: of the hosts.
        seed: of the day and the preemptions.
        scale: of the load.
        blind: from when to when Prometheus does not answer, seconds.
        counts_held: whether the metric has the jobs that hosts hold, as shipped; without them it is what a trigger
            on the queue's lists alone sees.
    """

    def __init__(
        self,
        rule: ScalingRule,
        hardware: Hardware,
        preemptions: Preemptions,
        seed: int = 0,
        scale: float = 1.0,
        blind: tuple[float, float] = (0.0, 0.0),
        counts_held: bool = True,
    ) -> None:
        self.jobs = draw_day(seed, scale)
        self.fleet = Fleet(hardware, preemptions, grace_s(), seed)
        self.autoscaler, self._blind, self._counts_held = Autoscaler(rule), blind, counts_held
        self._metric = 0.0
        self.most_hosts = 0

    def run(self) -> Figures:
        """Play the day, and then until nothing waits and the last host has gone."""
        fleet = self.fleet
        for job in self.jobs:
            fleet.at(job.at_s, fleet.enqueue, job)
        self._scrape_s = scrape_interval_s()
        fleet.at(0.0, self._scrape)
        fleet.at(3.0, self._poll)  # the three loops know nothing of each other
        fleet.at(7.0, self._sync)
        fleet.run(lambda: (fleet.now > DAY_S and not fleet.hosts and not fleet.load()) or fleet.now > 2 * DAY_S)
        hosts_s = sum(host.gone_at - host.asked_at for host in fleet.past)
        return figures_of(
            self.jobs,
            host_hours=hosts_s / 3600,
            idle_hours=fleet.lingered_s / 3600,
            most_hosts=self.most_hosts,
            starts=len(fleet.past),
            stops=fleet.drained,
            deaths=fleet.died,
            handed_over=fleet.handed_over,
            redelivered=fleet.redelivered,
        )

    def _scrape(self) -> None:
        self._metric = self.fleet.load() if self._counts_held else len(self.fleet.queue)
        self.fleet.at(self.fleet.now + self._scrape_s, self._scrape)

    def _poll(self) -> None:
        self._set(self.autoscaler.poll(self.fleet.now, self._seen(), len(self.fleet.hosts)))
        self.fleet.at(self.fleet.now + self.autoscaler.rule.polling_s, self._poll)

    def _sync(self) -> None:
        self._set(self.autoscaler.sync(self.fleet.now, self._seen(), len(self.fleet.hosts)))
        self.fleet.at(self.fleet.now + HPA_PERIOD_S, self._sync)

    def _seen(self) -> float | None:
        begin_s, end_s = self._blind
        return None if begin_s <= self.fleet.now < end_s else self._metric

    def _set(self, replicas: int) -> None:
        if replicas != len(self.fleet.hosts):
            self.fleet.scale(replicas)
        self.most_hosts = max(self.most_hosts, replicas)


def figures_of(jobs: Sequence[Job], host_hours: float, **more: float) -> Figures:
    """Return the figures of jobs that have run."""
    done = [job for job in jobs if job.done_at >= 0 and not job.has_failed]
    failed = sum(job.has_failed for job in jobs)
    waits = sorted(job.started_at - job.at_s for job in done)
    return Figures(
        jobs=len(jobs),
        lost=len(jobs) - len(done) - failed,
        failed=failed,
        wait_p50_s=waits[len(waits) // 2],
        wait_p95_s=waits[math.ceil(len(waits) * 0.95) - 1],
        wait_p99_s=waits[math.ceil(len(waits) * 0.99) - 1],
        wait_max_s=waits[-1],
        host_hours=host_hours,
        **more,  # type: ignore[arg-type]  # counts, by the names of the fields
    )


def oracle(jobs: Sequence[Job], hardware: Hardware, most: int) -> Figures:
    """Return the figures of hosts that are ready exactly when jobs need them, paying for each start.

    Args:
        jobs: of the day, in order; they are run anew.
        hardware: of the hosts.
        most: hosts at one time.
    """
    slots = [0.0] * (most * hardware.slots)  # when each is free
    edges: list[tuple[float, int]] = []
    for job in jobs:
        job.has_failed = False
        job.started_at = max(job.at_s, heapq.heappop(slots))
        job.done_at = job.started_at + hardware.job_s(job.steps)
        heapq.heappush(slots, job.done_at)
        edges += [(job.started_at, 1), (job.done_at, -1)]
    needed: list[list[tuple[float, float]]] = [[] for _ in range(most)]  # of each host: from when to when
    since: list[float] = []
    busy = 0
    for at_s, change in sorted(edges):
        busy += change
        while len(since) < math.ceil(busy / hardware.slots):
            since.append(at_s)
        while len(since) > math.ceil(busy / hardware.slots):
            needed[len(since) - 1].append((since.pop(), at_s))
    total_s, starts = 0.0, 0
    for intervals in needed:
        until = -math.inf
        for begin, end in intervals:
            gap_s = begin - until
            start_s = hardware.warm_s if gap_s - hardware.warm_s <= hardware.lingers_s else hardware.cold_s
            starts += gap_s > start_s
            total_s += min(gap_s, start_s) + end - begin
            until = end
    return figures_of(jobs, total_s / 3600, starts=starts, most_hosts=sum(map(bool, needed)))
