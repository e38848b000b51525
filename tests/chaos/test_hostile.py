"""A worker whose queues and control channels anybody can write to: it lives, and its good jobs do not notice.

    pytest tests/chaos/test_hostile.py -n 0 --long

Two cores, a worker on the fake engine, 274 s: 50,000 messages of 162 kinds beside 1,000 good jobs, 5,000 of raw bytes,
1,800 on the control channels; same process, every count exact, memory +8 MiB.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import redis
from celery.exceptions import NotRegistered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.utils.json import dumps

from sdtpu_worker import InvalidRequest, generate
from sdtpu_worker.delivery.deliveries import MAX_DEAD_LETTERS
from sdtpu_worker.delivery.envelope import BadEnvelope, check_envelope
from sdtpu_worker.errors import InvalidMessage
from sdtpu_worker.operations.prompt_guard import NOT_LOGGED
from sdtpu_worker.testing.processes import private_redis
from tests.chaos.fleet import Fleet, Ledger
from tests.chaos.footprint import assert_nothing_left, difference, footprint, is_as_before, pool_stats, settled
from tests.chaos.hostile_control import hostile_control_messages
from tests.support.clients import client_app
from tests.support.hostile import MAX_BYTES, REQUEST, Draft, hostile_messages
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEED = 20
QUEUES = ("sdtpu", "sdtpu.t0", "sdtpu.t1")
LISTS = [f"{queue}{suffix}" for queue in QUEUES for suffix in ("", *(f"\x06\x16{step}" for step in (3, 6, 9)))]


@pytest.fixture(scope="module")
def hostile_worker(tmp_path_factory):
    """Run a worker that hears gossip, as workers do by default; yields it, the client's app and a client of Redis."""
    folder = tmp_path_factory.mktemp("hostile")
    with (
        private_redis() as url,
        client_app(url, sdtpu_tenant_shards=2) as app,
        Fleet(url, folder, SDTPU_TENANT_SHARDS="2", SDTPU_CPU_DEVICES="4", SDTPU_SLOTS_PER_DEVICE="1") as fleet,
        redis.Redis.from_url(url) as client,
    ):
        worker = fleet.start("hostile")
        warm = Ledger()
        for i in range(40):
            warm.add(i, 1)
        warm.wait(60)
        yield worker, app, client
        assert worker.stop() == 0


def dead_counts(client: redis.Redis) -> Counter[str]:
    counts: dict[Any, Any] = client.hgetall("sdtpu:dead:counts")
    return Counter({kind.decode(): int(count) for kind, count in counts.items()})


def waiting(client: redis.Redis) -> int:
    return sum(map(client.llen, LISTS))


def test_hostile_messages_end_in_typed_errors_and_good_jobs_beside_them_do_not_notice(hostile_worker, long, capsys):
    worker, app, client = hostile_worker
    count, every = (50_000, 50) if long else (2_000, 20)
    good, expected, kinds = Ledger(), Counter(), Counter()
    for message in hostile_messages(SEED + 1, 6_000 if long else 1_000):  # its memory grows to what their kinds take
        client.lpush("sdtpu", message.raw)
    wait_until(lambda: waiting(client) == 0, "the first messages to be dealt with", 120)
    assert_nothing_left(app, client)
    counted_before = sum(dead_counts(client).values())
    before, started, pid = footprint(worker, client), time.monotonic(), worker.process.pid
    buried_before = pool_stats(app)["deliveries"]["dead_letters"]
    ids: dict[str, set[type]] = {}
    batch = client.pipeline(transaction=False)
    for i, message in enumerate(hostile_messages(SEED, count)):
        batch.lpush(LISTS[i % len(LISTS)], message.raw)
        is_request = message.kind.startswith(REQUEST)
        kinds[message.kind] += 1
        expected["run" if is_request else "put aside"] += 1
        if message.task_id is not None:
            ids.setdefault(message.task_id, set()).add(InvalidRequest if is_request else InvalidMessage)
        if i % every == 0:
            batch.execute()
            good.add(i, 1 + i % 7, priority=(0, 3, 6, 9)[i % 4])
            wait_until(lambda: waiting(client) < 2_000, "the worker to keep up", 120)
    batch.execute()
    good.wait(600)
    wait_until(lambda: waiting(client) == 0, "the queues to be empty", 600)
    assert_nothing_left(app, client)
    elapsed_s = time.monotonic() - started

    assert (worker.is_running, worker.process.pid) == (True, pid)
    assert (good.errors, good.wrong_pictures()) == ({}, [])
    counts = dead_counts(client)
    assert set(counts) <= {"InvalidMessage", "NotRegistered"}
    assert sum(counts.values()) - counted_before == expected["put aside"]
    assert pool_stats(app)["deliveries"]["dead_letters"] - buried_before == expected["put aside"]
    assert client.llen("sdtpu:dead") == min(MAX_DEAD_LETTERS, expected["put aside"])
    wrong = []
    for task_id, classes in ids.items():
        result = generate.AsyncResult(task_id)
        error = result.result if result.state == "FAILURE" else None
        allowed = (*classes, NotRegistered) if InvalidMessage in classes else tuple(classes)
        if not isinstance(error, allowed):
            wrong.append((task_id, classes, result.state, error))
    assert wrong == []
    after = settled(worker, client, before)
    assert is_as_before(before, after), (before, after)
    grown_kib = after.memory_kib - before.memory_kib
    assert grown_kib < 49_152
    with capsys.disabled():
        print(
            f"\nhostile messages: {count:,} of {len(kinds)} kinds beside {len(good.jobs):,} good jobs in"
            f" {elapsed_s:.0f} s: {expected['put aside']:,} put aside and counted, {expected['run']:,} ran into"
            f" InvalidRequest, {len(ids):,} ids have a typed error; all good jobs right, same process,"
            f" memory {grown_kib:+,} KiB, {difference(before, after)}"
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(("body", "headers", "properties", "content-type", "content-encoding"))
raw_messages = st.one_of(
    st.binary(max_size=3_000),
    json_values.map(lambda value: dumps(value).encode()),
    st.dictionaries(fields, json_values, max_size=5).map(lambda value: dumps(value).encode()),
)


def test_no_prompt_of_a_message_that_cannot_be_run_is_in_the_log(hostile_worker):
    worker, _, client = hostile_worker
    secret, before = "a portrait of my secret neighbour", sum(dead_counts(client).values())
    not_logged = worker.text().count(NOT_LOGGED)
    in_the_body, in_a_header, in_a_property = (Draft(random.Random(i)) for i in range(3))
    in_the_body.body = [[secret], secret]
    in_a_header.headers["eta"] = secret
    in_a_property.properties["priority"] = secret
    raws = [draft.encode() for draft in (in_the_body, in_a_header, in_a_property)]
    for raw in raws:
        with pytest.raises(BadEnvelope, match=secret):
            check_envelope(raw, {"sdtpu.generate"}, MAX_BYTES)
    client.lpush("sdtpu", *raws)
    wait_until(lambda: sum(dead_counts(client).values()) == before + len(raws), "all to be put aside")
    assert worker.text().count(NOT_LOGGED) == not_logged + len(raws)
    assert secret not in worker.text()


def test_any_bytes_at_all_are_put_aside_or_run(hostile_worker, long, capsys):
    worker, app, client = hostile_worker
    before, sent = sum(dead_counts(client).values()), 0

    @settings(
        max_examples=5_000 if long else 200, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(raw_messages, st.sampled_from(LISTS))
    def send(raw: bytes, name: str) -> None:
        nonlocal sent
        sent += 1
        client.lpush(name, raw)

    send()
    wait_until(lambda: sum(dead_counts(client).values()) == before + sent, "all to be put aside", 120)
    assert_nothing_left(app, client)
    assert worker.is_running
    assert generate.delay("x", seed=1, num_inference_steps=2).get(timeout=60)["seed"] == 1
    with capsys.disabled():
        print(f"\nraw bytes: {sent:,} messages made by Hypothesis, all put aside and counted")


def test_hostile_control_messages_cost_neither_the_worker_nor_a_job(hostile_worker, long, capsys):
    worker, app, client = hostile_worker
    messages = hostile_control_messages() * (10 if long else 1)
    before, connections_lost = footprint(worker, client), worker.text().count("Connection to broker lost")
    good, started = Ledger(), time.monotonic()
    for i, message in enumerate(messages):
        while not client.publish(message.channel, message.raw):
            time.sleep(0.01)  # the worker listens anew
        time.sleep(0.03)  # what comes while it does is lost
        if i % 10 == 0:
            good.add(i, 20, stamped_headers=["user"], user="alice")
    good.wait(60)
    app.control.time_limit("sdtpu.generate", soft=None, hard=None)
    assert len(app.control.ping(timeout=60, limit=1)) == 1
    elapsed_s = time.monotonic() - started
    assert worker.is_running
    assert (good.errors, good.wrong_pictures()) == ({}, [])
    assert worker.text().count("Connection to broker lost") == connections_lost
    assert_nothing_left(app, client)
    after = settled(worker, client, before)
    assert is_as_before(before, after), (before, after)
    with capsys.disabled():
        print(
            f"\nhostile control: {len(messages):,} messages of {len(set(messages)):,} kinds in {elapsed_s:.0f} s beside"
            f" {len(good.jobs)} good jobs: same process, no connection lost, the worker answers;"
            f" {difference(before, after)}"
        )
