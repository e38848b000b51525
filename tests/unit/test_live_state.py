"""What a page is told of the devices and of places in the queue, without a Redis."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.client.live_state import MOST_SAMPLES, Line, LiveState, sample_places
from sdtpu_worker.contract.load_report import WorkerLoad
from sdtpu_worker.contract.parameter_checks import MAX_GUIDANCE_SCALE
from sdtpu_worker.contract.served import Served
from sdtpu_worker.contract.slot_report import OccupiedSlot, SlotReport, living_slot_reports, slots_key
from sdtpu_worker.errors import BrokerUnavailable
from sdtpu_worker.web import live_feed
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.exchange import WebRequest
from sdtpu_worker.web.live_api import show_capabilities
from sdtpu_worker.web.live_feed import LiveFeed, of_batch
from sdtpu_worker.worker.slot_view import SlotReporter, SlotView
from tests.support.waiting import wait_until

BANDS = [0, 3, 6, 9]
SERVED = Served("small", ("ddim", "euler"), "ddim", 7.5, True, True, ("outline",), (), "start", True)
REPORT = SlotReport(2, 2, ("64x64", "64x96"), (1,), (OccupiedSlot(0, 1, "64x64", "job-a"),))


def load(host: str = "w@a", slots: int = 4) -> WorkerLoad:
    return WorkerLoad(host, slots, {"64x64": 0.1}, 5.0, {6: slots}, 2.0, 50, SERVED)


def state(lines: dict[str, list[Line]], workers: Any = (), slots: Any = None, shards: int = 0) -> LiveState:
    return LiveState("sdtpu", shards, BANDS, lines, list(workers), slots or {})


def waiting(*times: float) -> list[Line]:
    """Return the lists of a queue in which messages of the default priority wait, sent at these times."""
    return [Line(0), Line(0), Line(len(times), list(enumerate(times))), Line(0)]


# Reports


def test_what_a_worker_serves_and_holds_comes_back_from_its_json():
    assert WorkerLoad.from_json(load().to_json()) == load()
    assert SlotReport.from_json(REPORT.to_json()) == REPORT
    assert living_slot_reports(["a", "b"], [REPORT.to_json(), None]) == {"a": REPORT}
    assert slots_key("sdtpu", "w@a") == "sdtpu:load:slots:sdtpu:w@a"


@pytest.mark.parametrize(("field", "value"), [
    ("num_devices", 0), ("num_devices", True), ("slots_per_device", 2**20), ("sizes", "64x64"), ("lost", [2]),
    ("occupied", [[0, 0, "64x64"]]), ("occupied", [[9, 0, "64x64", "a"]]), ("occupied", [[0, 0, "64x64", "a" * 999]]),
    ("occupied", [[0, 0, "64x64", "a"]] * 2000),
])  # fmt: skip
def test_a_slot_report_out_of_its_bounds_is_left_out_with_a_line(field, value, caplog):
    text = json.dumps({**json.loads(REPORT.to_json()), field: value})
    assert living_slot_reports(["w@a"], [text]) == {}
    assert "the slot report of w@a is left out" in caplog.text


@pytest.mark.parametrize(("field", "value"), [
    ("model", 7), ("samplers", "ddim"), ("loras", ["a"] * 201), ("pictures", "all"), ("default_guidance_scale", "7"),
])  # fmt: skip
def test_a_load_report_whose_offer_is_out_of_its_bounds_is_refused(field, value):
    facts = json.loads(load().to_json())
    facts["serves"][field] = value
    with pytest.raises(ValueError, match=field):
        WorkerLoad.from_json(json.dumps(facts))


# Who is in which slot


def test_a_slot_view_follows_the_ticks_and_forgets_jobs_that_are_gone():
    view = SlotView()
    view.on_tick(Plan((64, 64), ((Phase(insert=(0, "a")), Phase(insert=(1, "b"))), ())))
    assert view.places({"a", "b"}) == {"a": (0, 0), "b": (0, 1)}
    view.on_tick(Plan((64, 64), ((), ()), resumed=(Place("a", 1, 1),)))
    assert view.places({"a"}) == {"a": (1, 1)}
    assert view.places({"a", "b"}) == {"a": (1, 1)}


def test_a_reporter_publishes_what_changes_and_survives_a_redis_that_is_away(monkeypatch):
    monkeypatch.setattr("sdtpu_worker.worker.slot_view._LOOK_EVERY_S", 0.005)
    texts, published = ["one"], []

    def publish(text: str) -> None:
        if texts == ["lost"]:
            raise ConnectionError("Redis is away")
        published.append(text)

    reporter = SlotReporter(lambda: texts[-1], publish)
    reporter.start()
    wait_until(lambda: published == ["one"])
    texts[:] = ["lost"]
    texts[:] = ["two"]
    wait_until(lambda: published == ["one", "two"])
    reporter.stop()


# What a caller may see


def test_a_caller_sees_its_own_slots_and_of_others_that_they_are_busy():
    report = SlotReport(2, 1, ("64x64", "64x96"), (1,),
                        (OccupiedSlot(0, 0, "64x64", "of-ann"), OccupiedSlot(0, 0, "64x96", "of-bob")))  # fmt: skip
    seen = of_batch(state({"sdtpu": waiting(1.0)}, [load("host.internal")], {"host.internal": report}), {"of-ann"})
    assert seen == {
        "known": True, "slots": 4, "busy": 2, "waiting": 1,
        "hosts": [{"name": "host 1", "slots": 4, "busy": 2, "devices": [
            {"lost": False, "slots": ["of-ann", "busy"]}, {"lost": True, "slots": [None, None]},
        ]}],
    }  # fmt: skip
    assert not {"of-bob", "internal"} & set(json.dumps(seen).replace('"', " ").split())


def test_a_worker_without_a_slot_report_shows_how_many_are_busy():
    (host,) = of_batch(state({}, [load()]), set())["hosts"]
    assert (host["busy"], host["devices"]) == (4, [])
    assert of_batch(None, set())["known"] is False


@pytest.mark.parametrize(
    ("follows", "negative", "most"),
    [(True, True, MAX_GUIDANCE_SCALE), (True, False, MAX_GUIDANCE_SCALE), (False, False, 1)],
)
def test_a_page_is_told_of_a_guidance_scale_and_of_a_negative_prompt_one_by_one(follows, negative, most):
    served = replace(SERVED, follows_guidance_scale=follows, takes_negative_prompt=negative)
    found = capabilities([replace(load(), serves=served)])
    assert found["guidance"] == {"minimum": 0, "maximum": most, "default": 7.5}
    assert found["negative_prompt"] is negative


def capabilities(workers: list[WorkerLoad]) -> dict[str, Any]:
    async def read() -> LiveState:
        return state({}, workers)

    async def read_body(most: int) -> bytes:
        return b""

    service: Any = SimpleNamespace(live=SimpleNamespace(read=read))
    answer = asyncio.run(show_capabilities(service, WebRequest("", {}, {}, Caller, read_body)))
    return json.loads(answer.body)


# Places in the queue


def test_a_job_knows_how_many_are_ahead_of_it():
    live = state({"sdtpu": waiting(10.0, 11.0, 12.0)}, [load()])
    waits = [live.find_wait({"prompt": "a fox", "priority": 6}, None, at) for at in (10.0, 12.0, 13.0)]
    assert [wait and wait.ahead for wait in waits] == [0, 2, None]
    assert 0 < waits[0].eta_s < waits[1].eta_s
    live = state({"sdtpu": [Line(2, [(0, 1.0), (1, 2.0)]), Line(0), *waiting(10.0, 11.0)[2:]]})
    wait = live.find_wait({"prompt": "a fox"}, None, 11.0)
    assert (wait.ahead, wait.eta_s) == (3, None), "more urgent ones come first; without a worker nobody knows when"


def test_messages_that_are_not_quite_in_order_are_found_all_the_same():
    live = state({"sdtpu": waiting(10.0, 10.2, 10.1, 10.3)})
    found = [live.find_wait({"prompt": "a fox", "priority": 6}, None, at).ahead for at in (10.0, 10.1, 10.2, 10.3)]
    assert found == [0, 2, 1, 3]


def test_a_long_list_is_sampled_evenly_and_a_short_one_whole():
    assert list(sample_places(3)) == [0, 1, 2]
    places = list(sample_places(1_000_000))
    assert (len(places), places[0], places[-1]) == (MOST_SAMPLES, 0, 999_999)
    line = Line(1_000_000, [(place, float(place)) for place in places])
    assert abs(line.ahead(500_000.5) - 500_000) <= 1_000_000 / (MOST_SAMPLES - 1)


# One reader for all


def test_any_number_of_pages_has_one_reader_which_ends_with_the_last_of_them(monkeypatch):
    monkeypatch.setattr(live_feed, "EVERY_S", 0.01)
    states = [state({"sdtpu": waiting(*range(n))}) for n in range(1, 100)]
    asked = []

    async def read() -> LiveState:
        asked.append(None)
        return states[min(len(asked), 20)]

    async def watch(feed: LiveFeed) -> list[int]:
        seen, number = [], 0
        while len(seen) < 10:
            number, found = await feed.next_state(number, 5)
            seen.append(found.waiting)
        return seen

    async def run() -> None:
        feed = LiveFeed(read)
        seen = await asyncio.gather(*(watch(feed) for _ in range(2000)))
        assert all(each == sorted(each) for each in seen)
        assert len(asked) == feed.reads <= 12
        await asyncio.wait_for(feed._task, 5)
        assert await feed.next_state(10**6, 0.02) is not None
        await feed.close()

    asyncio.run(run())


def test_a_queue_that_cannot_be_read_is_unknown_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(live_feed, "EVERY_S", 0.0)

    async def read() -> LiveState:
        raise BrokerUnavailable("Redis cannot be read")

    async def run() -> None:
        feed = LiveFeed(read)
        assert [await feed.read() for _ in range(3)] == [None] * 3

    asyncio.run(run())
    assert caplog.text.count("what the workers are at cannot be shown for now") == 1
