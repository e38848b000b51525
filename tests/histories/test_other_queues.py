"""What a worker's process consumes beside its jobs is none of delivery's business."""

from __future__ import annotations

from collections.abc import Callable

from tests.histories.world import World


def test_a_reply_of_another_worker_reaches_who_asked_for_it(new_world: Callable[[], World]):
    """As Celery's *mingle* asks, which was told that it is alone: its replies were dead-lettered as no jobs."""
    world = new_world()
    world.start("a")
    world.ask("a")
    world.run("a", "ask", 100)
    assert [name for name in world.workers["a"].actors if name.startswith("ask")]
    assert world.facts.replies == 1
    world.finish()
    world.close()
