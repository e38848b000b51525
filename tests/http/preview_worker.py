"""The fake worker of `tests.chaos.fake_worker`, whose engine makes previews too: they show how far their job is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.testing.fake_engine import FakeSnapshot, FakeTick
from tests.chaos import fake_worker
from tests.chaos.fake_worker import FakeDevicePool, PictureEngine, app
from tests.chaos.pictures import picture

__all__ = ["FakeDevicePool", "app"]


class PreviewEngine(PictureEngine):
    """A `PictureEngine` with previews."""

    def execute(
        self, plan: Plan, jobs: Mapping[str, Any], snapshots: Mapping[str, FakeSnapshot] | None = None
    ) -> FakeTick:
        """Follow a plan."""
        tick = super().execute(plan, jobs, snapshots)
        states = {place: self.slots.get((plan.lane, place.device, place.slot)) for place in plan.previews}
        tick.previews.update(
            {place.task_id: picture(state.value) for place, state in states.items() if state is not None}
        )
        return tick


fake_worker.PictureEngine = PreviewEngine  # type: ignore[misc]  # the double stands in for the class
