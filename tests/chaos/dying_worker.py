"""The fake worker, and it dies at a point of one's choosing: `celery -A tests.chaos.dying_worker worker`.

A prompt "die <phase>" ends the process with SIGKILL, the first time that its job comes to that point; the folder
`SDTPU_FAKE_MARKS` remembers by task id who had its turn. A third word is another accident of `fake_worker`. The
phases, in their order:

    waiting        a thread has the job, no slot
    encoding       it gets its slot
    denoising      it has done some of its steps
    decoding       the devices make its picture
    storing        its image is about to be stored
    stored         its image is stored, its result is not
    announced      the tasks linked to it are sent, its result is not stored
    counting       its result is stored, the chord that it is part of does not know yet
    done           its result is stored, its message is not acknowledged
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from celery.backends.redis import RedisBackend

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.images.store import ImageStore
from tests.chaos import fake_worker
from tests.chaos.fake_worker import FakeDevicePool, PictureEngine, PictureJob, app

__all__ = ["app"]

_phases: dict[str, str] = {}  # by task id, of the jobs that are here


def die(task_id: str, phase: str) -> None:
    """End the process if this job is to die here and has not died yet."""
    mark = Path(os.environ["SDTPU_FAKE_MARKS"]) / task_id
    if _phases.get(task_id) == phase and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class DyingEngine(PictureEngine):
    """Dies on the way to the picture."""

    def prepare(self, task_id: str, request: GenerationRequest) -> PictureJob:
        """Take note of a job."""
        words = request.prompt.split()
        if words[0] == "die":
            _phases[task_id] = words[1]
            request = replace(request, prompt=" ".join(words[2:]) or "x")
        die(task_id, "waiting")
        return super().prepare(task_id, request)

    def execute(self, plan: Any, jobs: Any, snapshots: Any = None) -> Any:
        """Follow a plan up to the point."""
        inserted = plan.inserted()
        for task_id in inserted:
            die(task_id, "encoding")
        for task_id in plan.steps_done:
            if task_id not in inserted:
                die(task_id, "denoising")
        tick = super().execute(plan, jobs, snapshots)
        for *_, task_id in plan.decoded():
            die(task_id, "decoding")
        return tick


class DyingStore:
    """An image store that dies before or after an image."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool]) -> str:
        """Store the image."""
        die(task_id, "storing")
        uri = self._store.put(task_id, image_format, data, give_up)
        die(task_id, "stored")
        return uri


class DyingDevicePool(FakeDevicePool):
    """The fake pool, with all that."""

    @staticmethod
    def make_store(app: Any, url: str) -> Any:
        """Make a store that dies."""
        return DyingStore(FakeDevicePool.make_store(app, url))


def _acknowledge(
    self: Deliveries, tag: str, acknowledge: Callable[[Deliveries, str], None] = Deliveries.acknowledge
) -> None:
    if (delivery := self._held.get(tag)) is not None:
        die(delivery.task_id, "done")
    acknowledge(self, tag)


def _mark_as_done(
    self: RedisBackend, task_id: str, *args: Any, done: Callable[..., None] = RedisBackend.mark_as_done, **kwargs: Any
) -> None:
    die(task_id, "announced")
    done(self, task_id, *args, **kwargs)


def _on_chord_part_return(
    self: RedisBackend, request: Any, *args: Any, count: Any = RedisBackend.on_chord_part_return, **kwargs: Any
) -> None:
    die(request.id, "counting")
    count(self, request, *args, **kwargs)


fake_worker.PictureEngine = DyingEngine  # type: ignore[misc]
Deliveries.acknowledge = _acknowledge  # type: ignore[method-assign]
RedisBackend.mark_as_done = _mark_as_done
RedisBackend.on_chord_part_return = _on_chord_part_return
app.conf.worker_pool = "tests.chaos.dying_worker:DyingDevicePool"
