"""Pointers and leads in a real Redis: of two equal jobs one leads, what is left there ends by itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from sdtpu_worker.contract.result import BatchPlace
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.reuse import ledger as ledgers
from sdtpu_worker.reuse.leads import Leads
from sdtpu_worker.reuse.ledger import HANDED_OVER_S, Ledger
from sdtpu_worker.reuse.notes import Lead, Pointer, token_of
from tests.support.waiting import wait_until

KEY = "f" * 64
POINTER = Pointer.of("an-id", b"image", None, BatchPlace(0, 0, 1, 2)).to_bytes()
ONE, OTHER = Lead(token_of("one"), 6), Lead(token_of("other"), 3)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def ledger(client) -> Ledger:
    return Ledger(lambda: client, Keys("prefix-"))


def test_the_first_job_leads_and_the_second_one_hears_of_it(ledger, client):
    assert ledger.enter(KEY, ONE) == (b"", b"")
    assert ledger.enter(KEY, ONE) == (b"", b""), "the lead is its own: it was redelivered, say"
    assert ledger.enter(KEY, OTHER) == (b"", ONE.to_bytes())
    assert ledger.enter("0" * 64, OTHER) == (b"", b"")
    ledger.leave(KEY, OTHER.token)
    assert ledger.enter(KEY, OTHER)[1] == ONE.to_bytes(), "only the leader gives up the lead"
    ledger.leave(KEY, ONE.token)
    assert ledger.enter(KEY, OTHER) == (b"", b"")
    assert all(name.startswith(b"prefix-sdtpu:reuse:") for name in client.scan_iter())


def test_of_many_that_come_at_once_one_leads(ledger):
    jobs = [Lead(token_of(str(i)), 6) for i in range(32)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda lead: ledger.enter(KEY, lead), jobs))
    assert answers.count((b"", b"")) == 1


def test_an_image_ends_the_lead_and_answers_everybody_until_it_is_forgotten(ledger, client):
    ledger.enter(KEY, ONE)
    ledger.leave(KEY, ONE.token, POINTER, 60)
    assert ledger.enter(KEY, OTHER) == (POINTER, b"")
    assert client.keys() == [f"prefix-sdtpu:reuse:{KEY}".encode()]
    assert 0 < client.ttl(client.keys()[0]) <= 60
    ledger.forget(KEY, b"another pointer")
    assert ledger.enter(KEY, OTHER) == (POINTER, b"")
    ledger.forget(KEY, POINTER)
    assert ledger.enter(KEY, OTHER) == (b"", b"")


def test_the_image_of_a_job_beside_leaves_the_lead_alone(ledger):
    ledger.enter(KEY, ONE)
    ledger.leave(KEY, OTHER.token, POINTER, 60)
    assert ledger.enter(KEY, OTHER) == (POINTER, b"")
    ledger.forget(KEY, POINTER)
    assert ledger.enter(KEY, OTHER)[1] == ONE.to_bytes()


def test_a_lead_can_be_taken_and_is_not_renewed_then(ledger):
    ledger.enter(KEY, ONE)
    assert ledger.enter(KEY, OTHER, take=True) == (b"", b"")
    ledger.renew({KEY: ONE})
    assert ledger.enter(KEY, ONE) == (b"", OTHER.to_bytes())


def test_a_lead_that_nobody_renews_expires_and_one_that_is_renewed_says_how_far_its_job_is(ledger, client, monkeypatch):
    monkeypatch.setattr(ledgers, "LEAD_S", 1.0)  # of a renewal
    stalled, leads = threading.Event(), Leads(ledger, lambda: not stalled.is_set(), every_s=0.05)
    leads.start()
    steps = iter(range(1, 10_000))

    def now() -> Lead:
        return Lead(ONE.token, 6, had_slot=True, pending=False, current=next(steps), total=9999)

    assert ledger.enter(KEY, ONE, life_s=1.0) == (b"", b"")
    leads.add(KEY, now)
    time.sleep(1.3)
    first = Lead.from_bytes(ledger.enter(KEY, OTHER)[1])
    assert first.had_slot
    assert first.current > 0
    wait_until(lambda: Lead.from_bytes(ledger.enter(KEY, OTHER)[1]).current > first.current, "it to be renewed")
    stalled.set()
    time.sleep(1.3)
    assert ledger.enter(KEY, OTHER) == (b"", b""), "the devices hang: another job may draw"
    leads.close()


def test_a_lead_that_no_worker_wrote_stops_nobody(ledger, client):
    name = Keys("prefix-").lead(KEY)
    client.set(name, ONE.to_bytes())
    assert ledger.enter(KEY, OTHER) == (b"", b""), "it would never expire"
    client.set(name, ONE.to_bytes(), px=int(2000 * HANDED_OVER_S))
    assert ledger.enter(KEY, OTHER) == (b"", b""), "it would expire too late"
    client.set(name, b"x" * 1_000_000, px=1000)
    assert len(ledger.enter(KEY, OTHER)[1]) < 1000


def test_a_pointer_of_another_type_is_an_error_that_the_next_image_mends(ledger, client):
    client.rpush(Keys("prefix-").pointer(KEY), "x")
    with pytest.raises(redis.exceptions.ResponseError):
        ledger.enter(KEY, ONE)
    ledger.leave(KEY, ONE.token, POINTER, 60)
    assert ledger.enter(KEY, ONE) == (POINTER, b"")


def test_a_failure_to_renew_is_not_the_end_of_it(client):
    down: list[Any] = [ConnectionError("away")]

    def connect() -> Any:
        if down:
            raise down[0]
        return client

    ledger = Ledger(connect, Keys("prefix-"))
    leads = Leads(ledger, lambda: True)
    leads.add(KEY, lambda: ONE)
    leads.pulse()
    down.clear()
    ledger.enter(KEY, ONE)
    client.pexpire(Keys("prefix-").lead(KEY), 50)
    leads.pulse()
    assert client.pttl(Keys("prefix-").lead(KEY)) > 1000
