"""A job as the policy sees it: what its client asked for, how far it is, and its place in the queue. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY

AGEING_S = 30.0
"""Seconds in which a waiting job rises by one priority, so that no job starves."""


@dataclass(frozen=True)
class Terms:
    """What a job's client asked for besides the image.

    Attributes:
        priority: a job with a lower number goes first; only a difference in this number lets a job take another
            job's slot.
        expires_at: a job that has had no slot by this time, on the clock of `plan(now)`, is dropped; also orders jobs
            of one priority.
        soft_time_limit_s, time_limit_s: how long the job may hold a slot.
        may_expire: False if the job had its slot in time, on another worker or in an earlier try.
    """

    priority: int = DEFAULT_PRIORITY
    expires_at: float = math.inf
    soft_time_limit_s: float = math.inf
    time_limit_s: float = math.inf
    may_expire: bool = True


@dataclass(frozen=True)
class Load:
    """What a job asks of its device beyond words and steps.

    Attributes:
        pictures: how many are encoded when the job gets its slot.
        controls: the numbers of the ControlNets that its steps ask.
        adapters: how many combinations of LoRAs are sent to the device when the job gets its slot, 0 or 1.
        windows: how many windows its longest prompt has besides the first.
    """

    pictures: int = 0
    controls: frozenset[int] = frozenset()
    adapters: int = 0
    windows: int = 0


NO_LOAD = Load()


@dataclass(frozen=True)
class Eligibility:
    """Which jobs the policy may give a slot; ask with `task_id in eligibility`.

    Attributes:
        task_ids: the jobs that are named.
        excludes: True if every job is eligible except those named, False if only those named are.
        avoid: devices that start and resume no job meanwhile, if there is another device.
    """

    task_ids: frozenset[str] = frozenset()
    excludes: bool = True
    avoid: frozenset[int] = frozenset()

    def __contains__(self, task_id: str) -> bool:
        return (task_id in self.task_ids) is not self.excludes

    @classmethod
    def only(cls, task_ids: Iterable[str], avoid: Iterable[int] = ()) -> Eligibility:
        """Return the eligibility of these jobs and no other, on other devices than those to avoid."""
        return cls(frozenset(task_ids), excludes=False, avoid=frozenset(avoid))

    @classmethod
    def all_but(cls, task_ids: Iterable[str]) -> Eligibility:
        """Return the eligibility of every job except these."""
        return cls(frozenset(task_ids), excludes=True)


EVERY_JOB = Eligibility()


class Overdue(Enum):
    """Why the policy dropped a job whose time was over."""

    EXPIRED = "expired before it had a slot"
    SOFT_TIME_LIMIT = "soft time limit"
    TIME_LIMIT = "time limit"


@dataclass
class QueuedJob:
    """A job that waits or has a slot.

    Attributes:
        number: the order of arrival.
        remaining: denoising steps that the job has still to take.
        has_started: the job has had a slot, here or on another worker.
        parked: the job's snapshot waits for a slot.
        slot_since: when the job got its slot.
        used_s: the seconds that the job spent in slots that it lost.
        load: what it asks of its device besides.
        previewed_at: how many steps it had taken at its last preview.
    """

    task_id: str
    num_steps: int
    terms: Terms
    number: int
    arrived_at: float
    remaining: int
    has_started: bool = False
    parked: bool = False
    slot_since: float = 0.0
    used_s: float = 0.0
    load: Load = NO_LOAD
    previewed_at: int = 0

    @property
    def steps_done(self) -> int:
        """How many denoising steps the job has taken."""
        return self.num_steps - self.remaining

    def level(self, now: float) -> int:
        """Return the priority, improved by the time since the job arrived."""
        return math.floor(self.terms.priority - (now - self.arrived_at) / AGEING_S)

    def order(self, now: float) -> tuple[int, float, int]:
        """Return the key that jobs are sorted by: priority, then deadline, then arrival."""
        return self.level(now), self.terms.expires_at, self.number

    def work_s(self, cost: Cost) -> float:
        """Return the seconds that one device, working alone, needs until the job's image is decoded."""
        load = self.load
        insert_s = 0.0 if self.has_started else cost.insert_of(load.pictures, load.adapters, load.windows)
        return self.remaining * cost.step_of(load.controls, load.windows) + cost.decode_s + insert_s
