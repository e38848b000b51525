"""The protocol by which an idle worker learns of new jobs, under a seeded scheduler: no wake-up is ever lost.

A model of Redis (a list, the connection of the claims, the connection of the notices) stands beside the real
`ClaimSchedule`. The scheduler picks the next event among all that are possible: a client pushes, Redis runs the claim
that was sent, the worker reads a reply, the worker reads notices, the event loop turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sdtpu_worker.delivery.claim_schedule import POLL_S, REFUSED_PAUSE_S, SAFETY_POLL_S, ClaimSchedule


@dataclass
class Redis:
    """One list; what is under way to the worker on its two connections."""

    waiting: int = 0
    is_tracked: bool = False  # the list was found empty, and the first write to it is told
    claim: bool = False
    replies: list[int] = field(default_factory=list)
    notices: int = 0

    def push(self) -> None:
        self.waiting += 1
        self.notices += self.is_tracked
        self.is_tracked = False

    def run_claim(self) -> None:
        self.claim = False
        self.replies.append(min(self.waiting, 1))
        self.is_tracked = self.is_tracked or not self.waiting
        self.waiting -= self.replies[-1]


class Worker:
    """The event loop with the real schedule; its clock stands still, so whatever waits for the clock waits for ever."""

    def __init__(self, redis: Redis, schedule: ClaimSchedule) -> None:
        self.redis, self.schedule, self.in_flight = redis, schedule, False

    def turn(self) -> None:
        if not self.in_flight and self.schedule.is_due(0.0):
            self.schedule.on_send()
            self.redis.claim = self.in_flight = True

    def read_reply(self) -> None:
        self.in_flight = False
        if self.redis.replies.pop():
            self.schedule.on_message()
        else:
            self.schedule.on_empty(0.0, is_told=True)

    def read_notices(self) -> None:
        self.redis.notices = 0
        self.schedule.on_notice()


def possible(redis: Redis, worker: Worker) -> dict[str, Callable[[], None]]:
    """Return the events that may come next, all but a client's push."""
    events = {
        "the event loop turns": (not worker.in_flight and worker.schedule.is_due(0.0), worker.turn),
        "Redis runs the claim": (redis.claim, redis.run_claim),
        "the worker reads the reply": (bool(redis.replies), worker.read_reply),
        "the worker reads the notices": (redis.notices > 0, worker.read_notices),
    }
    return {name: act for name, (can_happen, act) in events.items() if can_happen}


def play(seed: int, schedule: ClaimSchedule) -> tuple[int, list[str]]:
    """Let things happen in an order that the seed decides, until nothing can happen without the clock.

    Returns:
        How many jobs are left in Redis, and what happened.
    """
    rng, redis, history = random.Random(seed), Redis(), []
    worker, pushes = Worker(redis, schedule), rng.randint(1, 4)
    while (events := possible(redis, worker)) or pushes:
        if pushes and (not events or rng.random() < 0.3):
            name, act = "a client pushes", redis.push
            pushes -= 1
        else:
            name = rng.choice(sorted(events))
            act = events[name]
        history.append(name)
        act()
    return redis.waiting, history


@pytest.mark.parametrize("first_seed", range(0, 3000, 500))
def test_every_job_is_claimed_without_waiting_for_the_clock_in_whatever_order_things_happen(first_seed):
    for seed in range(first_seed, first_seed + 500):
        left, history = play(seed, ClaimSchedule())
        assert not left, f"seed {seed}: a job waits for the safety look:\n" + "\n".join(history)


def test_the_model_finds_a_schedule_that_forgets_a_notice():
    class Forgetful(ClaimSchedule):
        def on_notice(self) -> None:
            self._at = 0.0

    assert any(play(seed, Forgetful())[0] for seed in range(500))


def test_an_idle_worker_looks_once_a_second_or_often_where_redis_does_not_tell():
    schedule = ClaimSchedule()
    assert schedule.is_due(0.0)
    schedule.on_send()
    assert schedule.on_empty(10.0, is_told=True) == SAFETY_POLL_S
    assert (schedule.is_due(10.99), schedule.is_due(11.0)) == (False, True)
    assert schedule.on_empty(20.0, is_told=False) == POLL_S
    assert (schedule.is_due(20.001), schedule.is_due(20.01)) == (False, True)


def test_after_an_error_of_redis_the_next_claim_waits_whatever_redis_tells():
    schedule = ClaimSchedule()
    schedule.on_send()
    assert schedule.on_refusal(10.0) == REFUSED_PAUSE_S
    schedule.on_notice()
    assert (schedule.is_due(10.9), schedule.is_due(11.0)) == (False, True)
