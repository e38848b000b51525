"""Histories of one device loop that a seed draws: every job ends once, rightly, and only sick devices are lost.

    python -m pytest tests/histories/test_device_loop.py -n 0                            # 300, as in CI
    python -m pytest tests/histories/test_device_loop.py --long -n auto --dist load      # 100,000: hours
    python -m pytest tests/histories/test_device_loop.py -n 0 --seeds 42:43              # one, again

Jobs of two sizes come, are cancelled, expire, preempt each other and break programs; devices fail, hang, get sick and
well again; the worker drains. A history that breaks something is made as short as possible and printed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Iterator

import pytest

from tests.histories.device_world import Fault, History, Wish, World

HISTORIES = 300, 100_000
"""In CI, and in the long form."""
_FIELDS = ("wishes", "faults", "drains")


def draw(seed: int) -> History:
    """Return the history of a seed."""
    chance = random.Random(seed)
    devices, slots = chance.randint(1, 5), chance.randint(1, 3)
    kinds = ["well"] * 12 + chance.choice(([], ["poison", "nan", "alone", "moved", "forged"]))
    wishes = tuple(
        Wish(
            at=round(chance.uniform(0, 4), 3),
            steps=chance.randint(1, 60),
            lane=int(chance.random() < 0.2),
            priority=chance.choice((6, 6, 6, 0, 9)),
            kind=chance.choice(kinds),
            cancelled_s=round(chance.uniform(0, 2), 3) if chance.random() < 0.1 else math.inf,
            expires_s=round(chance.uniform(0, 3), 3) if chance.random() < 0.1 else math.inf,
            limit_s=round(chance.uniform(0.1, 3), 3) if chance.random() < 0.1 else math.inf,
        )
        for _ in range(chance.randint(1, 30))
    )
    kinds = ["dispatch", "late", "nan", "nan", "raise", "well", "slow"] + ["hang", "lost"] * (chance.random() < 0.1)
    faults = tuple(
        Fault(chance.randint(0, 40), chance.choice(kinds), chance.randrange(devices), chance.random() < 0.4)
        for _ in range(chance.choice((0, 0, 1, 1, 2, 4)))
    )
    drains = tuple(
        (round(chance.uniform(0, 6), 3), chance.choice((0.0, 0.2, 3.0))) for _ in range(chance.choice((0, 0, 1, 2)))
    )
    return History(seed, devices, slots, wishes, faults, drains)


def outcome(history: History) -> str | None:
    """Run a history; return what broke."""
    try:
        World(history).run()
    except Exception as exc:  # of any kind: each is something that broke
        return f"{type(exc).__name__}: {exc}"
    return None


def fewer(history: History) -> Iterator[History]:
    """Yield histories with one thing less."""
    for name in _FIELDS:
        things = getattr(history, name)
        for i in range(len(things)):
            yield dataclasses.replace(history, **{name: things[:i] + things[i + 1 :]})


def shrink(history: History) -> History:
    """Return a history that breaks something and of which no part can be left out."""
    while (shorter := next((one for one in fewer(history) if outcome(one)), None)) is not None:
        history = shorter
    return history


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep thousands of expected errors out of the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(24 * 3600)
def test_histories_of_a_device_loop(seeds: range):
    for seed in seeds:
        if outcome(draw(seed)) is not None:
            shortest = shrink(draw(seed))
            raise AssertionError(f"the history of seed {seed} breaks: {outcome(shortest)}\n{shortest}")
