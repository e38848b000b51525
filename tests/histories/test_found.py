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
