"""A job's turn, with a real Redis and without a worker: what it is answered with, and when it draws after all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.contract.result import BatchPlace
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue
from sdtpu_worker.errors import StorageError
from sdtpu_worker.images.encode import encode_image
from sdtpu_worker.reuse.ledger import Ledger
from sdtpu_worker.reuse.stored_image import Drawn
from sdtpu_worker.worker import reuse as reuse_of_a_worker
from sdtpu_worker.worker.job_control import JobControl
from sdtpu_worker.worker.job_record import JobRecord
from sdtpu_worker.worker.reuse import Reuse
from tests.support.waiting import wait_until

LANE = (8, 16)


class Store:
    """An image store in memory."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.asked: list[str] = []

    def uri_of(self, task_id: str, image_format: str) -> str:
        return f"memory:{task_id}.{image_format}"

    def read_picture(self, uri: str, give_up: Any) -> bytes | None:
        self.asked.append(uri)
        if self.error is not None:
            raise self.error
        assert give_up(), "one attempt is made"
        return self.data.get(uri)


@dataclass
class Room:
    """One worker's reuse, and what a test changes of what is around it."""

    client: Any
    store: Store = field(default_factory=Store)
    counts: Counter[str] = field(default_factory=Counter)
    aside: set[str] = field(default_factory=set)
    drains: bool = False
    error: Exception | None = None
    digests: Exception | None = None
    asked: int = 0

    def digest(self, job: Any) -> str:
        if self.digests is not None:
            raise self.digests
        return "pixels"

    def connect(self) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.client

    def make(self, **options: Any) -> Reuse:
        engine: Any = SimpleNamespace(info=SimpleNamespace(model="m"), pixel_digests=lambda: self.digest)
        deliveries: Any = SimpleNamespace(aside=self.aside, on_free=lambda: None)
        options = {"count": lambda outcome: self.counts.update([outcome]), **options}
        return Reuse(engine, Ledger(self.connect, Keys()), self.store, deliveries, **options)

    def run(self, reuse: Reuse, task_id: str, request: GenerationRequest | None = None, **control: Any) -> Drawn:
        """Do what a worker does for a job that it draws at once: a picture of one colour."""
        request = request or GenerationRequest("a", seed=1)
        with self.turn(reuse, task_id, request, **control) as turn:
            drawn = turn.found or Drawn(self.image(request), None, BatchPlace(1, 0, 2, 8))
            self.store.data[self.store.uri_of(task_id, request.image_format)] = drawn.data
            turn.keep(drawn, time.monotonic())
        return drawn

    def turn(
        self,
        reuse: Reuse,
        task_id: str,
        request: GenerationRequest | None = None,
        record: JobRecord | None = None,
        **control: Any,
    ) -> Any:
        request, record = request or GenerationRequest("a", seed=1), record or JobRecord(task_id)
        job: Any = SimpleNamespace(task_id=task_id, lane=LANE, num_steps=4, parameters={"num_inference_steps": 4})
        return reuse.turn(
            job, request, text_of(request), JobControl(**control), record, lambda: self.drains, record.stage
        )

    @staticmethod
    def image(request: GenerationRequest, colour: int = 7, size: tuple[int, int] = LANE) -> bytes:
        return encode_image(np.full((*size, 3), colour, np.uint8), request.image_format, text_of(request))


def text_of(request: GenerationRequest) -> dict[str, Any]:
    return {"prompt": request.prompt, "seed": request.seed, **request.options()}


@pytest.fixture
def room(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        yield Room(client)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_an_equal_job_gets_the_very_bytes(room, image_format):
    reuse, request = room.make(), GenerationRequest("ein Füchslein 🦊\n(…)", seed=1, image_format=image_format)
    first, second, third = (room.run(reuse, name, request) for name in ("one", "two", "three"))
    assert [drawn.reused for drawn in (first, second, third)] == [False, True, True]
    assert first.data == second.data == third.data
    assert second.batch == first.batch
    assert room.counts == {"drawn": 1, "stored": 2}
    assert room.store.asked[-1] == f"memory:two.{image_format}", "the newest image lives longest"


def test_an_image_that_started_from_the_same_picture_elsewhere_says_where_its_own_was(room):
    reuse = room.make()
    here, there = (GenerationRequest("a", seed=1, image=f"redis:sdtpu:image:{name}") for name in ("here", "there"))
    first, second = room.run(reuse, "one", here), room.run(reuse, "two", there)
    assert second.reused
    assert second.data == room.image(there) != first.data, "as if it had been drawn"
    assert b"image:there" in second.data


@pytest.mark.parametrize(
    "stored",
    [
        None,
        b"",
        b"no image",
        Room.image(GenerationRequest("a", seed=1))[:-1],
        Room.image(GenerationRequest("a", seed=1), colour=8),
        Room.image(GenerationRequest("a", seed=1), size=(16, 8)),
        Room.image(GenerationRequest("a", seed=1, image_format="jpeg")),
    ],
)
def test_an_image_that_is_gone_or_another_one_is_drawn_again(room, stored):
    reuse = room.make()
    room.run(reuse, "one")
    room.store.data["memory:one.png"] = stored
    assert not room.run(reuse, "two").reused
    assert room.counts == {"drawn": 2, "gone": 1}
    assert room.run(reuse, "three").reused


@pytest.mark.parametrize("verdict", [None, False, True])
def test_the_safety_checkers_verdict_and_the_place_go_with_the_image(room, verdict):
    reuse, place = room.make(), BatchPlace(3, 1, 5, 16)
    with room.turn(reuse, "one") as turn:
        drawn = Drawn(room.image(GenerationRequest("a", seed=1)), verdict, place)
        room.store.data["memory:one.png"] = drawn.data
        turn.keep(drawn, time.monotonic())
    found = room.run(reuse, "two")
    assert (found.nsfw, found.batch, found.reused) == (verdict, place, True)


def test_a_pointer_to_another_jobs_image_gives_nothing_away(room):
    reuse, other = room.make(), GenerationRequest("somebody else's", seed=1)
    room.run(reuse, "one")
    (mine,) = room.client.keys()
    room.run(reuse, "victim", other)
    (theirs,) = set(room.client.keys()) - {mine}
    room.client.set(mine, room.client.get(theirs))
    assert not room.run(reuse, "two").reused


def test_a_store_that_does_not_answer_is_asked_once(room):
    reuse = room.make()
    room.run(reuse, "one")
    room.store.error = StorageError("away")
    assert not room.run(reuse, "two").reused


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), redis.TimeoutError("slow"), OSError("gone")])
def test_without_redis_a_job_is_drawn_and_redis_is_not_asked_again_at_once(room, error):
    reuse = room.make()
    room.error = error
    assert not room.run(reuse, "one").reused
    asked = room.asked
    assert not room.run(reuse, "two").reused
    assert room.asked == asked
    assert room.counts == {"unknown": 2}


def test_redis_may_go_away_while_a_job_waits_or_draws(room):
    reuse = room.make()
    with room.turn(reuse, "leader"):
        waits = threading.Thread(target=room.run, args=(reuse, "waiting"))
        waits.start()
        wait_until(lambda: room.aside, "the second job to wait")
        room.error = redis.ConnectionError("away")
        waits.join(5)
    assert not waits.is_alive()
    assert room.counts == {"drawn": 1, "unknown": 1}
    assert not room.aside


def follow(room: Room, reuse: Reuse, task_id: str = "waiting", **control: Any) -> tuple[threading.Thread, list[Any]]:
    """Start a job that waits for another one; return its thread, and where its end will be."""
    ends: list[Any] = []

    def run() -> None:
        try:
            ends.append(room.run(reuse, task_id, **control))
        except Exception as exc:
            ends.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: task_id in room.aside or ends, "the job to wait")
    return thread, ends


def test_a_job_that_waits_gets_the_leaders_image_at_once(room, monkeypatch):
    monkeypatch.setattr(reuse_of_a_worker, "LOOK_EVERY_S", 2.0)
    reuse = room.make()
    shown: list[Any] = []
    with room.turn(reuse, "leader") as turn:
        thread, ends = follow(room, room.make(progress_s=0.01), publish=shown.append)
        here, ends_here = follow(room, reuse, "here")
        drawn = Drawn(room.image(GenerationRequest("a", seed=1)), None, BatchPlace(1, 0, 2, 8))
        room.store.data["memory:leader.png"] = drawn.data
        wait_until(lambda: shown, "its progress to be published")
        turn.keep(drawn, time.monotonic())
        here.join(1)
        assert not here.is_alive(), "on the same worker it is told at once"
    thread.join(5)
    assert [end[0].data for end in (ends, ends_here)] == [drawn.data] * 2
    assert (shown[0].description, shown[0].total, shown[0].pending) == ("an equal job waits for a slot", 4, True)
    assert room.counts == {"drawn": 1, "waited": 2}
    assert not room.aside


@pytest.mark.parametrize("error", [RuntimeError("a failure"), JobCancelled(), JobOverdue(Overdue.TIME_LIMIT)])
def test_when_a_leader_ends_without_an_image_a_waiting_job_draws(room, error):
    reuse = room.make()
    with contextlib.suppress(type(error)), room.turn(reuse, "leader"):
        thread, ends = follow(room, reuse)
        raise error
    thread.join(5)
    assert not ends[0].reused
    assert room.counts == {"drawn": 1, "took_over": 1}


def test_the_lead_of_a_job_that_is_handed_over_waits_for_the_next_worker(room):
    reuse, next_worker = room.make(), room.make()
    snapshot: Any = object()
    with pytest.raises(JobHandedOver), room.turn(reuse, "leader"):
        raise JobHandedOver(snapshot)
    thread, ends = follow(room, reuse)
    assert not room.run(next_worker, "leader", snapshot=b"it continues").reused
    thread.join(5)
    assert ends[0].reused
    assert room.counts == {"drawn": 2, "waited": 1}


def test_a_job_that_is_handed_over_before_its_first_step_gives_up_the_lead(room):
    reuse = room.make()
    with pytest.raises(JobHandedOver), room.turn(reuse, "leader"):
        raise JobHandedOver
    assert not room.run(reuse, "another").reused
    assert room.counts == {"drawn": 2}


def test_a_job_with_a_snapshot_waits_for_nobody(room):
    reuse = room.make()
    with room.turn(reuse, "leader"):
        assert not room.run(reuse, "resumed", snapshot=b"x").reused
    assert room.counts == {"drawn": 1, "beside": 1}
    assert room.run(reuse, "another", snapshot=b"x").reused, "an image is better than a snapshot"


def test_the_time_that_a_job_waits_is_measured(room):
    reuse, record, turned = room.make(), JobRecord("waiting"), threading.Event()

    def wait() -> None:
        with room.turn(reuse, "waiting", record=record):
            turned.set()

    with room.turn(reuse, "leader"):
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: room.aside, "the job to wait")
        time.sleep(0.3)
        assert not turned.is_set()
    thread.join(5)
    assert turned.is_set()
    started_at, ended_at = record.stages["reuse"]
    assert ended_at - started_at >= 0.3


def test_only_so_many_jobs_wait(room):
    reuse = room.make(most_followers=1)
    with room.turn(reuse, "leader"):
        thread, _ = follow(room, reuse)
        assert not room.run(reuse, "third").reused
    thread.join(5)
    assert room.counts == {"drawn": 1, "beside": 1, "waited": 1}


@pytest.mark.parametrize(
    ("control", "end"),
    [
        ({"may_start": lambda: False}, JobCancelled),
        ({"terms": Terms(expires_at=0.0)}, None),
        ({"drains": True}, JobHandedOver),
    ],
)
def test_a_job_that_waits_ends_when_it_should(room, control, end):
    reuse = room.make()
    room.drains = control.pop("drains", False)
    with room.turn(reuse, "leader"):
        thread, ends = follow(room, reuse, **control)
        thread.join(2)
        assert not thread.is_alive()
    if end is None:
        assert room.counts["ahead"] == 1, "its leader would have no slot in time: it asks for one itself, and expires"
    else:
        assert isinstance(ends[0], end)
    assert not room.aside


def test_a_waiting_job_expires_while_its_leader_has_no_slot(room):
    reuse = room.make()
    soon = Terms(expires_at=time.monotonic() + 1)
    with room.turn(reuse, "leader", terms=soon):
        thread, ends = follow(room, reuse, terms=soon)
        thread.join(3)
    assert isinstance(ends[0], JobOverdue)
    assert ends[0].reason is Overdue.EXPIRED


def test_a_more_urgent_job_takes_the_lead_and_keeps_it(room):
    reuse = room.make()
    with room.turn(reuse, "patient", terms=Terms(priority=9)):
        with room.turn(reuse, "urgent", terms=Terms(priority=0)):
            thread, ends = follow(room, reuse, terms=Terms(priority=3))
        thread.join(5)
    assert not ends[0].reused
    assert room.counts == {"drawn": 1, "ahead": 1, "took_over": 1}


@pytest.mark.parametrize(("across", "counts"), [(False, {"drawn": 3, "stored": 1}), (True, {"drawn": 1, "stored": 3})])
def test_tenants_share_only_if_that_is_asked_for(room, across, counts):
    reuse = room.make(across_tenants=across)
    for number, tenant in enumerate(("a", "b", None, "a")):
        room.run(reuse, str(number), tenant=tenant)
    assert room.counts == counts


@pytest.mark.parametrize(
    ("expires_s", "least", "most"), [(100.0, 85, 90), (86_400.0, 86_300, 86_340), (None, 86_300, 86_340)]
)
def test_a_pointer_ends_before_the_image(room, expires_s, least, most):
    room.run(room.make(expires_s=expires_s), "one")
    (key,) = room.client.keys()
    assert least < room.client.ttl(key) <= most


def test_a_job_whose_key_cannot_be_made_is_drawn(room, caplog):
    reuse = room.make()
    room.digests = TypeError("no rule")
    assert not room.run(reuse, "one").reused
    assert "task one has no reuse key" in caplog.text
    assert room.client.keys() == []


def test_an_image_that_took_longer_to_store_than_images_are_kept_is_not_pointed_to(room):
    reuse = room.make(expires_s=10.0)
    with room.turn(reuse, "one") as turn:
        turn.keep(Drawn(b"x", None, BatchPlace(0, 0, 1, 1)), time.monotonic() - 10)
    assert room.client.keys() == []
