"""Histories that a seed draws: no job is lost, none ends twice, no crash is counted that was none.

python -m pytest tests/histories -n 0            # a minute, in CI
python -m pytest tests/histories -n 0 --long     # 200,000 histories: hours
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.histories.history import Step, draw, run, shrink
from tests.histories.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(24 * 3600)]


def test_histories(new_world: Callable[[], World], request: pytest.FixtureRequest):
    for seed in range(200_000 if request.config.getoption("--long") else 2_000):
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
