"""Histories that a seed draws: no job is lost, none ends twice, no crash is counted that was none.

    python -m pytest tests/histories/test_histories.py                                   # 2,000, as in CI
    python -m pytest tests/histories/test_histories.py --long -n auto --dist load        # 200,000: hours
    python -m pytest tests/histories/test_histories.py --seeds 5000:9000                 # those of some seeds
    python -m pytest tests/histories/test_histories.py -n 0 --seeds 42:43                # one, again

The seeds are run in slices, each a test of its own: so they can share the machine's cores, and a slice that has passed
counts. A history that breaks is made as short as possible and printed as a script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.histories.history import Step, draw, run, shrink
from tests.histories.world import World

HISTORIES = 2_000, 200_000
"""In CI, and in the long form."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(24 * 3600)]


def test_histories(new_world: Callable[[], World], seeds: range):
    for seed in seeds:
        steps = draw(seed)
        if (error := outcome(steps, new_world)) is not None:
            raise AssertionError(report(seed, steps, error, new_world))


def outcome(steps: Sequence[Step], new_world: Callable[[], World]) -> Exception | None:
    """Run a history in a new world; return what broke."""
    try:
        run(steps, new_world())
    except Exception as exc:  # of any kind: each is something that broke
        return exc
    return None


def report(seed: int, steps: Sequence[Step], error: Exception, new_world: Callable[[], World]) -> str:
    """Return the shortest script that breaks in the same way."""

    def fails(fewer: Sequence[Step]) -> bool:
        other = outcome(fewer, new_world)
        return type(other) is type(error)

    shortest = shrink(steps, fails)
    lines = "\n".join(f"    {step}" for step in shortest)
    return f"the history of seed {seed} breaks: {outcome(shortest, new_world)!r}\n{lines}\n    world.finish()"
