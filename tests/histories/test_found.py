"""Histories that a seed found, and that were mended: each broke before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.histories.world import World


@pytest.fixture
def world(new_world: Callable[[], World]) -> Iterator[World]:
    """Give a world, and end it."""
    world = new_world()
    yield world
    world.close()


def test_a_claim_that_is_in_flight_when_the_devices_begin_to_hang(world: World):
    """Nobody read its reply, so nobody renewed its lease: the job ran twice, and counted as one whose worker died."""
    world.start("a")
    world.send(9.0)
    world.run("a", "main", 5)
    world.hang("a")
    world.advance(10.8)
    world.finish()
    assert world.redelivered() == 0


def test_a_claim_that_is_in_flight_in_a_hang_while_another_worker_takes_its_job(world: World):
    """The late reply brought the job once more, which expired there, though it had its slot on the other worker."""
    world.start("a")
    world.send(9.0, 11.3)
    world.send(9.0, 0.0, 8.6)
    world.start("b")
    world.run("b", "main", 6)
    world.run("a", "main", 3)
    world.hang("a")
    world.advance(8.9)
    world.finish()


def test_a_claim_that_is_in_flight_while_its_worker_is_paused(world: World):
    """The late reply brought the job once more, which expired there, though the other worker ran it in time."""
    world.start("b")
    world.run("b", "main", 100)
    world.advance(8.0)
    world.pause("b")
    world.send(9.0, 0.0, 7.5)
    world.start("a")
    world.run("a", "main", 5)
    world.resume("b")
    world.pause("a")
    world.advance(9.0)
    world.resume("a")
    world.finish()
    assert world.facts.ends == {"t0": "SUCCESS"}


def test_a_job_that_waits_for_a_slot_while_its_worker_is_paused(world: World):
    """Likewise: it expired here as soon as the worker went on."""
    for host in ("b", "a"):
        world.start(host)
        world.run(host, "main", 100)
        world.advance(8.0)
        if host == "b":
            world.pause("b")
    world.send(9.0)
    world.send(9.0)
    world.send(9.0, 0.0, 12.0)
    world.advance(1.0)
    world.resume("b")
    world.pause("a")
    world.advance(13.0)
    world.resume("a")
    world.finish()
    assert world.facts.ends["t2"] == "SUCCESS"


def test_workers_that_stand_still_while_redis_clock_is_set_back(world: World):
    """By about as much: to a worker that looked at Redis' clock alone no time had passed."""
    world.start("a")
    world.start("b")
    world.advance(5.7)
    world.step_redis(-5.5)
    world.stall_before_sweep(6.5)
    world.send(1.0)
    world.finish()
    assert world.redelivered() == 0
