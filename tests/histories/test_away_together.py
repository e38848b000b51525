"""Workers that were away together, or whose Redis' clock was set, take no live job from each other.

Each history was found by a seed, or drawn by hand, and failed before a worker looked at both clocks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.histories.worker import LEASE_S
from tests.histories.world import World


@pytest.fixture
def world(new_world: Callable[[], World]):
    """Give a world with two workers that know Redis for a lease; the first one runs a long job."""
    world = new_world()
    world.start("a")
    world.send(job_s=4 * LEASE_S)
    world.run("a", "main", 100)
    world.advance(0.3 * LEASE_S)  # so that `b` sweeps between two renewals of `a`, and just before the second
    world.start("b")
    world.advance(1.2 * LEASE_S)
    assert "job-t0-1" in world.workers["a"].runnable()
    yield world
    world.close()


@pytest.mark.parametrize("is_suspended", [False, True], ids=["stopped", "suspended"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_paused_together(world: World, first: str, is_suspended: bool):
    """SIGSTOP, and a suspended machine whose monotonic clock stands still; either may wake first."""
    world.pause("a", is_suspended)
    world.pause("b", is_suspended)
    world.advance(2 * LEASE_S)
    world.resume(first)
    world.advance(0.4 * LEASE_S)
    world.finish()
    assert world.redelivered() == 0


def test_paused_within_a_pulse(world: World):
    """Everything stands still when a worker has looked at the clocks and sweeps next."""
    world.stall_before_sweep(2 * LEASE_S)
    world.finish()
    assert world.redelivered() == 0


@pytest.mark.parametrize("steps_s", [[2 * LEASE_S], [0.4 * LEASE_S] * 4, [-LEASE_S, 1.5 * LEASE_S]])
def test_redis_clock_is_set_forward(world: World, steps_s: list[float]):
    """At once, and bit by bit, each time by less than a lease has left."""
    for seconds in steps_s:
        world.step_redis(seconds)
        world.advance(0.9)
    world.finish()
    assert world.redelivered() == 0


def test_one_worker_alone_that_was_away_loses_its_jobs(world: World):
    world.pause("a")
    world.advance(2 * LEASE_S)
    world.finish()
    assert world.redelivered() == 1


def test_a_worker_that_is_killed_while_all_are_away_loses_its_jobs(world: World):
    world.pause("a")
    world.pause("b")
    world.advance(2 * LEASE_S)
    world.kill("a")
    world.finish()
    assert world.redelivered() == 1
