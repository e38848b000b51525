"""The fake worker, and it dies at a point of one's choosing: `celery -A tests.chaos.dying_worker worker`.

A prompt "die <phase>" ends the process with SIGKILL, the first time that its job comes to that point; the folder
`SDTPU_FAKE_MARKS` remembers by task id who had its turn, and what had happened by then. A third word is another
accident of `fake_worker`. The phases are in `tests.chaos.moments`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from celery.backends.redis import RedisBackend

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.images.store import ImageStore
from tests.chaos import fake_worker
from tests.chaos.fake_worker import FakeDevicePool, PictureEngine, PictureJob, app
from tests.chaos.moments import EVENTS, LINKS

__all__ = ["app"]

_phases: dict[str, str] = {}  # by task id, of the jobs that are here
_events: dict[str, set[str]] = {}  # by task id, what the engine saw of them


def note(task_id: str, event: str) -> None:
    """Take note of something that happened to a job."""
    _events.setdefault(task_id, set()).add(event)


def events_of(task_id: str) -> list[str]:
    """Return what has happened to a job: on the devices as the engine saw it, the rest as Redis has it."""
    client, meta = app.backend.client, app.backend.get_task_meta(task_id, cache=False)
    stored = {
        "image stored": client.exists(f"sdtpu:image:{task_id}"),
        "links sent": any(client.type(key) == b"list" for key in client.keys(f"{LINKS}*")),
        "result stored": meta["status"] == "SUCCESS",
    }
    return [event for event in EVENTS if stored.get(event, event in _events.get(task_id, ()))]


def die(task_id: str, phase: str) -> None:
    """End the process if this job is to die here and has not died yet."""
    mark = Path(os.environ["SDTPU_FAKE_MARKS"]) / task_id
    if _phases.get(task_id) == phase and not mark.exists():
        mark.write_text(json.dumps(events_of(task_id)))
        os.kill(os.getpid(), signal.SIGKILL)


class DyingEngine(PictureEngine):
    """Dies on the way to the picture."""

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Mapping[str, Any]) -> PictureJob:
        """Take note of a job."""
        words = request.prompt.split()
        if words[0] == "die":
            _phases[task_id] = words[1]
            request = replace(request, prompt=" ".join(words[2:]) or "x")
        die(task_id, "waiting")
        return super().prepare(task_id, request, pictures)

    def execute(self, plan: Any, jobs: Any, snapshots: Any = None) -> Any:
        """Follow a plan up to the point."""
        for state in list(self.slots.values()):
            if state.step and state.steps_left:
                note(state.task_id, "steps taken")
                die(state.task_id, "denoising")
        for task_id in plan.inserted():
            note(task_id, "slot given")
            die(task_id, "encoding")
        tick = super().execute(plan, jobs, snapshots)
        for *_, task_id in plan.decoded():
            note(task_id, "decoding")
            die(task_id, "decoding")
        tick.wait = _noting_pictures(tick.wait)  # type: ignore[method-assign]  # a tick of the test's own
        return tick


def _noting_pictures(wait: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    def wait_and_note() -> list[Any]:
        images = wait()
        for image in images:
            note(image.task_id, "picture made")
        return images

    return wait_and_note


class DyingStore:
    """An image store that dies before or after an image."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Callable[[], bool]) -> str:
        """Store the image."""
        die(task_id, "storing")
        uri = self._store.put(task_id, image_format, data, give_up)
        die(task_id, "stored")
        with (Path(os.environ["SDTPU_FAKE_MARKS"]) / f"{task_id}.stored").open("a") as file:
            file.write("x")
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


fake_worker.PictureEngine = DyingEngine  # type: ignore[misc]  # the double stands in for the class
Deliveries.acknowledge = _acknowledge  # type: ignore[method-assign]  # dies on its way
RedisBackend.mark_as_done = _mark_as_done
RedisBackend.on_chord_part_return = _on_chord_part_return
app.conf.worker_pool = "tests.chaos.dying_worker:DyingDevicePool"
