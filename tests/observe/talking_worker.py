"""The fake worker of tests/chaos, whose engine logs a line when it prepares a job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sdtpu_worker.config import Config
from sdtpu_worker.contract.request import GenerationRequest
from tests.chaos.fake_worker import FakeDevicePool, PictureEngine, PictureJob, app

__all__ = ["app"]

logger = logging.getLogger(__name__)


class TalkingEngine(PictureEngine):
    """Says that it is at work, and not for which job."""

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Mapping[str, Any]) -> PictureJob:
        """Log a line and make a job."""
        logger.warning("a line of a job's code")
        return super().prepare(task_id, request, pictures)


class TalkingPool(FakeDevicePool):
    """The pool on this engine."""

    @staticmethod
    def make_engine(config: Config, on_phase: Callable[[str], None]) -> TalkingEngine:
        """Make the engine at once."""
        return TalkingEngine(config.cpu_devices, int(config.slots_per_device), 0.01)


app.conf.worker_pool = "tests.observe.talking_worker:TalkingPool"
