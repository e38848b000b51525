"""A job as the policy sees it: what its client asked for, how far it is, where it stands in the order. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.contract.queues import DEFAULT_PRIORITY

AGEING_S = 30.0
"""A job that waits goes up one priority in this time, so that nothing starves."""


@dataclass(frozen=True)
class Terms:
    """What a job's client asked for besides the picture.

    Attributes:
        priority: lower goes first; only a difference in this number lets a job take another's slot.
        expires_at: when the job is not wanted any more unless it has a slot, on the clock of `plan(now)`.
        soft_time_limit_s, time_limit_s: how long it may hold a slot.
    """

    priority: int = DEFAULT_PRIORITY
    expires_at: float = math.inf
    soft_time_limit_s: float = math.inf
    time_limit_s: float = math.inf


@dataclass(frozen=True)
class Admission:
    """Who may have a slot: these jobs, or everybody but these; a job is `in` it or not."""

    task_ids: frozenset[str] = frozenset()
    others: bool = True

    def __contains__(self, task_id: str) -> bool:
        return (task_id in self.task_ids) is not self.others


EVERYBODY = Admission()


class Overdue(Enum):
    """Why a job had to leave."""

    EXPIRED = "expired before it had a slot"
    SOFT_TIME_LIMIT = "soft time limit"
    TIME_LIMIT = "time limit"


@dataclass
class QueuedJob:
    """A job that waits or has a slot, as the policy sees it."""

    task_id: str
    num_steps: int
    terms: Terms
    number: int  # order of arrival
    arrived_at: float
    remaining: int
    has_started: bool = False
    parked: bool = False
    slot_since: float = 0.0
    used_s: float = 0.0  # in slots that it lost

    def level(self, now: float) -> int:
        """Return the priority, improved by the time since it arrived."""
        return math.floor(self.terms.priority - (now - self.arrived_at) / AGEING_S)

    def order(self, now: float) -> tuple[int, float, int]:
        """Return the key that jobs are sorted by: priority, then deadline, then arrival."""
        return self.level(now), self.terms.expires_at, self.number

    def work_s(self, cost: Cost) -> float:
        """Return the seconds of a lone device until its picture is there."""
        return self.remaining * cost.step_s + cost.decode_s + (0.0 if self.has_started else cost.insert_s)
