"""Hosts that come and go, in virtual time: how they start, stop and die, and what becomes of jobs.

A host is its slots: a job occupies one for its steps, its insert and its decode, whatever its neighbours do. That is
what batching at every step comes to, but for one thing: a tick lasts as long as its busiest device, so everything
takes longer by a share (`Hardware.ticks`) that `sdtpu_worker/planning/simulation.py` says, which simulates every tick
with the real policy. With it mean and 99th percentile of the latency are its own within 15 %, and never better, from 30
to 80 % of the limit (`tests/unit/test_autoscaling.py`). So a whole day takes seconds.

What the product does with jobs is kept: a host holds two batches, the second one next in line; at SIGTERM it finishes
what it can within `SDTPU_GRACE_S` and hands every other job over, to be continued at its step; when it dies its jobs
come back once their leases have expired and a worker that has been in contact for a lease has swept, and start anew; a
job that was on `sdtpu_max_deliveries` hosts that died fails.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.settings_table import SETTINGS

_DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
LEASE_S: float = _DEFAULTS["sdtpu_lease_s"]
MAX_DELIVERIES: int = _DEFAULTS["sdtpu_max_deliveries"]
BATCHES_HELD = 2


@dataclass(frozen=True)
class Hardware:
    """What a host is; the defaults are assumptions for a host of eight chips with a large checkpoint.

    Attributes:
        slots: jobs that it denoises at the same time.
        step_s, insert_s, decode_s: seconds of a step, of an insert and of a decode.
        ticks: by how much a tick lasts longer than the work of one slot in it.
        cold_s: from the decision to the first job, where the machine has to be had first.
        warm_s: likewise, on a machine that is still there.
        lingers_s: for how long a machine stays after its worker has left.
    """

    slots: int = 8
    step_s: float = 0.4
    insert_s: float = 0.2
    decode_s: float = 0.4
    ticks: float = 1.12
    cold_s: float = 300.0
    warm_s: float = 60.0
    lingers_s: float = 600.0

    def job_s(self, steps: int) -> float:
        """Return the seconds that a job with so many steps occupies a slot."""
        return (self.insert_s + steps * self.step_s + self.decode_s) * self.ticks


@dataclass(frozen=True)
class Preemptions:
    """How often spot hosts are taken away.

    Attributes:
        mean_s: how long a host lives on average; 0 for ever.
        without_notice: the share of them that just vanish; the others get SIGTERM.
    """

    mean_s: float = 0.0
    without_notice: float = 0.5


@dataclass(eq=False, slots=True)
class Job:
    """One job: what it asks for, and what has become of it."""

    at_s: float
    steps: int
    left: int = 0
    started_at: float = -1.0  # first slot
    done_at: float = -1.0
    died: int = 0
    has_failed: bool = False
    until: float = 0.0  # of the slot that it has


@dataclass(eq=False, slots=True)
class Host:
    """One worker, from the decision to start it until it is gone."""

    asked_at: float
    ready_at: float
    running: dict[Job, None] = field(default_factory=dict)  # in the order of their starts
    next_in_line: deque[Job] = field(default_factory=deque)
    is_ready: bool = False
    is_leaving: bool = False
    gone_at: float = -1.0

    @property
    def held(self) -> int:
        return len(self.running) + len(self.next_in_line)


class Fleet:
    """Hosts and the queue in Redis, driven by events in the order of their times.

    Args:
        hardware: of each host.
        preemptions: of each host.
        grace_s: `SDTPU_GRACE_S`.
        seed: of the preemptions.
    """

    def __init__(self, hardware: Hardware, preemptions: Preemptions, grace_s: float, seed: int = 0) -> None:
        self.hardware, self.preemptions, self.grace_s = hardware, preemptions, grace_s
        self.now = 0.0
        self.queue: deque[Job] = deque()
        self.hosts: list[Host] = []  # that are there or asked for, without those that leave
        self.past: list[Host] = []
        self.lost_jobs_of: deque[list[Job]] = deque()  # of hosts that died, until they are redelivered
        self.died = self.drained = self.handed_over = self.redelivered = 0
        self.lingered_s = 0.0  # of machines without a worker
        self._machines: list[float] = []  # until when machines without a worker stay
        self._asking: deque[Host] = deque()
        self._draw = random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._leaving: set[Host] = set()

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have something done at a time."""
        heapq.heappush(self._events, (time_s, next(self._order), action, arguments))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Do what is due, until it is over."""
        while self._events and not is_over():
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)

    def load(self) -> int:
        """Return the metric: jobs that wait, and jobs that are held, also by hosts that are dead or leave."""
        held = sum(host.held for host in (*self.hosts, *self._leaving))
        return len(self.queue) + held + sum(map(len, self.lost_jobs_of))

    def enqueue(self, job: Job) -> None:
        """Send a job."""
        job.left = job.steps
        self.queue.append(job)
        self._hand_out()

    def scale(self, replicas: int) -> None:
        """Start or stop hosts until there are so many: first those that are not ready, then the youngest."""
        while len(self.hosts) < replicas:
            self._start()
        for host in sorted(self.hosts, key=lambda host: (host.is_ready, -host.asked_at))[: len(self.hosts) - replicas]:
            self._stop(host)

    def _start(self) -> None:
        self._machines = [until for until in self._machines if until > self.now]
        is_warm = bool(self._machines)
        if is_warm:
            until = max(self._machines)
            self._machines.remove(until)
            self.lingered_s -= until - self.now
        host = Host(self.now, self.now + (self.hardware.warm_s if is_warm else self.hardware.cold_s))
        self.hosts.append(host)
        self.at(host.ready_at, self._become_ready, host)
        if self.preemptions.mean_s:
            self.at(self.now + self._draw.expovariate(1 / self.preemptions.mean_s), self._preempt, host)

    def _become_ready(self, host: Host) -> None:
        if host.gone_at < 0 and not host.is_leaving:
            host.is_ready = True
            self._asking.append(host)
            self._hand_out()

    def _preempt(self, host: Host) -> None:
        """Take a host away; the Deployment asks for another one at once."""
        if host.gone_at >= 0 or host.is_leaving:
            return
        if self._draw.random() < self.preemptions.without_notice:
            self.hosts.remove(host)
            self._die(host)
        else:
            self._stop(host, keeps_machine=False)
        self._start()

    def _die(self, host: Host) -> None:
        host.gone_at = self.now
        self.past.append(host)
        self.died += 1
        for job in host.running:
            job.died += 1
            job.until = 0.0
        jobs = [*host.running, *host.next_in_line]
        host.running.clear()
        host.next_in_line.clear()
        if jobs:
            self.lost_jobs_of.append(jobs)
            left_s = LEASE_S * self._draw.uniform(2 / 3, 1)  # leases are renewed every third of them
            sweep_s = LEASE_S * self._draw.uniform(0, 1 / 3)  # and so often looked for
            self.at(self.now + left_s + sweep_s, self._redeliver, jobs)

    def _redeliver(self, jobs: list[Job]) -> None:
        """Put jobs whose leases have expired at the front, if a worker may sweep; else look again later."""
        if not any(host.is_ready and self.now - host.ready_at >= LEASE_S for host in self.hosts):
            self.at(self.now + LEASE_S / 3, self._redeliver, jobs)
            return
        self.lost_jobs_of.remove(jobs)
        for job in sorted(jobs, key=lambda job: job.at_s)[::-1]:
            job.left = job.steps
            if job.died >= MAX_DELIVERIES:
                job.has_failed = True
                job.done_at = self.now
            else:
                self.redelivered += 1
                self.queue.appendleft(job)
        self._hand_out()

    def _stop(self, host: Host, keeps_machine: bool = True) -> None:
        """Send SIGTERM."""
        self.hosts.remove(host)
        host.is_leaving = True
        self._leaving.add(host)
        self.drained += host.is_ready
        deadline = self.now + self.grace_s
        waiting = list(host.next_in_line)
        host.next_in_line.clear()
        self.handed_over += len(waiting)
        self.queue.extendleft(reversed(waiting))
        stays = [job for job in host.running if job.until <= deadline]
        if len(stays) < len(host.running):
            self.at(deadline, self._hand_over, host)
        elif not stays:
            self._leave(host)
        if keeps_machine and host.is_ready:
            self._machines.append(self.now + self.hardware.lingers_s)
            self.lingered_s += self.hardware.lingers_s
        self._hand_out()

    def _hand_over(self, host: Host) -> None:
        """Requeue what a host that stops could not finish, with its snapshots."""
        jobs = [job for job in host.running if job.until > self.now]
        for job in sorted(jobs, key=lambda job: job.at_s)[::-1]:
            rest_s = (job.until - self.now) / self.hardware.ticks - self.hardware.decode_s
            job.left = min(job.left, max(0, int(rest_s / self.hardware.step_s) + 1))
            job.until = 0.0
            host.running.pop(job, None)
            self.handed_over += 1
            self.queue.appendleft(job)
        if not host.running:
            self._leave(host)
        self._hand_out()

    def _leave(self, host: Host) -> None:
        if host in self._leaving:
            self._leaving.discard(host)
            host.gone_at = self.now
            self.past.append(host)

    def _hand_out(self) -> None:
        """Give jobs to the hosts in turn, as long as they hold less than two batches."""
        limit = BATCHES_HELD * self.hardware.slots
        while self.queue and self._asking:
            host = self._asking.popleft()
            if host.is_leaving or host.gone_at >= 0:
                continue
            host.next_in_line.append(self.queue.popleft())
            self._fill(host)
            if host.held < limit:
                self._asking.append(host)

    def _fill(self, host: Host) -> None:
        while host.next_in_line and len(host.running) < self.hardware.slots:
            job = host.next_in_line.popleft()
            if job.started_at < 0:
                job.started_at = self.now
            job.until = self.now + self.hardware.job_s(job.left)
            host.running[job] = None
            self.at(job.until, self._finish, host, job, job.until)

    def _finish(self, host: Host, job: Job, until: float) -> None:
        if job.until != until or job not in host.running:
            return  # it left this slot before
        host.running.pop(job, None)
        job.done_at = self.now
        if host.is_leaving:
            if not host.running:
                self._leave(host)
            return
        if host.held == BATCHES_HELD * self.hardware.slots - 1:
            self._asking.append(host)
        self._fill(host)
        self._hand_out()
