"""Overload protection and fair shares where jobs are enqueued."""

from __future__ import annotations

import json
import math
import pickle
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from celery import Celery, _state, group
from celery.exceptions import Retry
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from sdtpu_worker import DeadlineUnreachable, GenerationRequest, InvalidRequest, QueueFull, generate, install
from sdtpu_worker.client.admission import MARGIN, messages_ahead
from sdtpu_worker.contract.load_report import (
    WorkerLoad,
    estimated_start_s,
    living_loads,
    publish_load,
    read_loads,
    withdraw_load,
)
from sdtpu_worker.contract.queues import shard_queues, tenant_queue

BUSY = WorkerLoad("a", num_slots=4, step_s={"64x64": 0.1}, mean_job_s=8.0, held={6: 4}, next_free_s=3.0)


def waiting(redis: Redis, queue: str = "sdtpu") -> int:
    return sum(redis.llen(queue + step) for step in ("", "\x06\x163", "\x06\x166", "\x06\x169"))


def commands_of_a_call(redis: Redis, call) -> list[str]:
    """Return what Redis saw during a call, leaving out connecting and what the garbage collector does to results."""
    call()
    with redis.monitor() as monitor:
        call()
        redis.echo("the end")
        seen = []
        while not (command := monitor.next_command()["command"]).startswith("ECHO"):
            seen.append(command.split()[0])
    return [command for command in seen if command not in ("HELLO", "CLIENT", "UNSUBSCRIBE")]


# --- estimates ---


def test_a_job_starts_at_once_where_a_slot_is_free_or_held_by_a_less_urgent_job():
    free = WorkerLoad("a", 4, {}, 8.0, {6: 3})
    assert estimated_start_s([free], 0, 6, False) == 0
    assert estimated_start_s([free], 1, 6, False) == 0  # when two slots' worth of jobs stand before it, one may wait
    assert estimated_start_s([free], 3, 6, False) == pytest.approx(2 * 8 / 4)
    assert estimated_start_s([BUSY], 0, 3, False) == 0
    assert estimated_start_s([], 5, 6, False) is None


def test_a_job_waits_for_what_the_worker_holds_and_for_the_messages_ahead():
    assert estimated_start_s([BUSY], 0, 6, False) == 3
    assert estimated_start_s([BUSY], 10, 6, False) == 3 + 10 * 2
    holding = WorkerLoad("a", 4, {}, 8.0, {6: 8}, 3.0)
    assert estimated_start_s([holding], 0, 6, False) == 3 + 4 * 2
    assert estimated_start_s([holding], 0, 6, True) == 3  # passes those without a deadline that are held
    assert estimated_start_s([WorkerLoad("a", 4, {}, 8.0, {0: 8, 6: 4}, 3.0)], 0, 6, True) == 3 + 4 * 2


def test_a_second_worker_takes_its_share():
    other = WorkerLoad("b", 2, {}, 4.0, {6: 4}, 10.0)
    assert estimated_start_s([BUSY], 40, 6, False) == 83
    assert estimated_start_s([BUSY, other], 1, 6, False) == 5  # before the other has a place
    together = estimated_start_s([BUSY, other], 40, 6, False)
    assert (together - 3) / 2 + (together - 14) / 2 == pytest.approx(40)


loads = st.builds(
    WorkerLoad,
    host=st.text(),
    num_slots=st.integers(1, 64),
    step_s=st.dictionaries(st.sampled_from(["64x64", "512x512"]), st.floats(0, 10)),
    mean_job_s=st.floats(0.01, 1000),
    held=st.dictionaries(st.integers(0, 9), st.integers(0, 200)),
    next_free_s=st.floats(0, 1000),
)


@given(st.lists(loads, min_size=1, max_size=5), st.integers(0, 10_000), st.integers(0, 9), st.booleans())
def test_more_ahead_never_starts_a_job_sooner_and_more_workers_never_later(workers, ahead, priority, has_deadline):
    start_s = estimated_start_s(workers, ahead, priority, has_deadline)
    slack = 1e-6 * (1 + start_s)
    assert 0 <= start_s < math.inf
    assert estimated_start_s(workers, ahead + 1, priority, has_deadline) >= start_s - slack
    if len(workers) > 1:
        assert estimated_start_s(workers[1:], ahead, priority, has_deadline) >= start_s - slack
    assert (
        estimated_start_s(workers, ahead, priority, True) <= estimated_start_s(workers, ahead, priority, False) + slack
    )


@given(loads)
def test_a_report_crosses_json_unchanged(load):
    assert WorkerLoad.from_json(load.to_json()) == load


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"host": "a"}', BUSY.to_json().replace("8.0", "NaN"), BUSY.to_json().replace("8.0", "0")],
)
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        WorkerLoad.from_json(text)


NOW = (1_700_000_000, 0)
MOST_EAST = timezone(timedelta(hours=23))
GOOD = {
    "host": '"a"', "num_slots": "4", "step_s": '{"64x64": 0.1}', "mean_job_s": "8.0", "held": '{"6": 4}',
    "next_free_s": "3.0", "until": "1700000010.5",
}  # fmt: skip
ODD = (
    *("NaN", "Infinity", "-Infinity", "1e400", "1e308", "5e-324", "0", "-1", "1000000", "1e9", "1e-6"),
    *("9" * 400, "9" * 5000, "true", "null", '""', '"7"', '"\\ud800"', "[]", "[" * 10_000, "{}", '{"a": 1}'),
    *('{"6": 1e308}', '{"6": 5e-324}', '{"6": NaN}', '{"64x64": -1}', '{"-0": 1000000}', '{"٦": 1}'),
    *(f'{{"6": {"9" * 400}}}', f'{{"{"9" * 400}": 1}}', f'{{"{"9" * 5000}": 1}}'),
)


def report(fields: dict[str, str]) -> bytes:
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}").encode()


def assert_usable(reports: dict[str, bytes]) -> None:
    """What a client computes of any reports is a number that says something."""
    request = GenerationRequest("a", num_inference_steps=1000)
    loads = living_loads(reports, NOW)
    for priority, has_deadline in ((0, False), (6, True), (255, False)):
        for ahead in (0, 10**9):
            start_s = estimated_start_s(loads, ahead, priority, has_deadline)
            assert (start_s is None) == (not loads)
            assert start_s is None or 0 <= start_s < math.inf
    assert all(0 <= load.job_s(request) < math.inf for load in loads)


@given(
    st.lists(
        st.dictionaries(st.sampled_from([*GOOD, "more"]), st.sampled_from(ODD)).map(lambda odd: report(GOOD | odd))
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(lambda value: json.dumps(value).encode())
        | st.binary(),
        max_size=4,
    )
)
def test_no_report_that_anybody_wrote_stops_a_client(texts):
    """`until: 10**400` made `delay()` raise an OverflowError."""
    assert_usable({f"host {i}": text for i, text in enumerate(texts)})


@pytest.mark.parametrize("name", [*GOOD, "more"])
def test_every_odd_value_in_every_field_is_either_sensible_or_left_out_with_a_warning(name, caplog):
    assert len(living_loads({"a": report(GOOD)}, NOW)) == 1
    for odd in ODD:
        caplog.clear()
        texts = {"odd": report({**GOOD, name: odd}), "good": report({**GOOD, "host": '"b"'})}
        assert_usable(texts)
        caplog.clear()
        found = living_loads(texts, NOW)
        has_ended = name == "until" and odd in ("0", "1000000", "1e9", "1e-6", "5e-324")
        assert len(found) + caplog.text.count("a worker's load report is left out: ") == 2 - has_ended
        assert any(load.host == "b" for load in found)
        assert len(caplog.text) < 500


def test_a_report_that_is_too_large_or_lives_too_long_is_left_out(caplog):
    large = report({**GOOD, "more": json.dumps("x" * 70_000)})
    for_ever = report({**GOOD, "until": "1700003700"})
    many = report({**GOOD, "held": json.dumps({str(i): 1 for i in range(2000)})})
    assert living_loads({"large": large, "for ever": for_ever, "many": many}, NOW) == []
    for reason in ("at most 65,536 bytes, got 70,", "until must be a number", "entries in held must be"):
        assert reason in caplog.text


def test_messages_ahead_are_the_more_urgent_ones_and_a_turn_of_every_queue_per_place():
    alone = {"q": [1, 2, 30, 40]}
    assert [messages_ahead(alone, "q", band) for band in range(4)] == [1, 3, 33, 73]
    shared = {"q": [0, 0, 0, 0], "q.t0": [2, 0, 10_000, 9], "q.t1": [0, 0, 5, 9]}
    assert messages_ahead(shared, "q.t1", 2) == 2 + 5 + 5
    assert messages_ahead(shared, "q", 2) == 2
    assert messages_ahead(shared, "q.t0", 2) == 2 + 10_000 + 5


# --- reports in Redis ---


@pytest.mark.parametrize("prefix", ["", "tenants:"])
def test_a_report_is_read_until_it_runs_out_or_is_withdrawn(redis, prefix):
    assert read_loads(redis, "sdtpu", prefix) == []
    other = WorkerLoad("b", 1, {}, 1.0, {})
    publish_load(redis, "sdtpu", other, prefix)
    publish_load(redis, "sdtpu", BUSY, prefix)
    assert read_loads(redis, "sdtpu", prefix) == [BUSY, other]
    assert [key.decode() for key in redis.scan_iter()] == [f"{prefix}sdtpu:load:sdtpu"]
    withdraw_load(redis, "sdtpu", "b", prefix)
    assert read_loads(redis, "sdtpu", prefix) == [BUSY]
    assert read_loads(redis, "other", prefix) == []


def test_a_dead_workers_report_vanishes_while_others_go_on(redis):
    publish_load(redis, "sdtpu", WorkerLoad("dead", 1, {}, 1.0, {}))
    publish_load(redis, "sdtpu", BUSY)
    assert len(read_loads(redis, "sdtpu")) == 2
    report = json.loads(redis.hget("sdtpu:load:sdtpu", "dead"))
    redis.hset("sdtpu:load:sdtpu", "dead", json.dumps({**report, "until": report["until"] - 60}))
    assert read_loads(redis, "sdtpu") == [BUSY]
    publish_load(redis, "sdtpu", BUSY)
    assert redis.hkeys("sdtpu:load:sdtpu") == [b"a"]
    assert 0 < redis.ttl("sdtpu:load:sdtpu") <= 15


def test_a_damaged_report_is_left_out(redis):
    publish_load(redis, "sdtpu", BUSY)
    redis.hset("sdtpu:load:sdtpu", "odd", "not json")
    redis.hset("sdtpu:load:sdtpu", "old", json.dumps({"until": 1e12, "slots": 3}))
    assert read_loads(redis, "sdtpu") == [BUSY]


def test_forged_reports_stop_neither_a_client_nor_a_worker(app, redis):
    for i, odd in enumerate(("9" * 400, "9" * 5000, "1e400", "[" * 10_000)):
        redis.hset("sdtpu:load:sdtpu", f"until {i}", report({**GOOD, "until": odd}))
        redis.hset("sdtpu:load:sdtpu", f"slots {i}", report({**GOOD, "until": str(time.time() + 60), "num_slots": odd}))
    app.conf.sdtpu_max_queue = 10
    generate.apply_async(("a",), expires=60)
    assert waiting(redis) == 1
    publish_load(redis, "sdtpu", BUSY)
    assert read_loads(redis, "sdtpu") == [BUSY]
    assert not any(key.startswith(b"until") for key in redis.hkeys("sdtpu:load:sdtpu")), "gone like those of the dead"


@pytest.mark.parametrize(
    "expires", [10**400, 10**5000, math.inf, math.nan, datetime.min.replace(tzinfo=MOST_EAST)], ids=range(5)
)
def test_an_expiry_that_is_no_time_is_refused_before_anything_is_asked_or_sent(app, redis, expires):
    app.conf.sdtpu_max_queue = 10
    with pytest.raises(InvalidRequest, match="expires must be a number of seconds up to"):
        generate.apply_async(("a",), expires=expires)
    assert waiting(redis) == 0


# --- refusals ---


def test_a_full_queue_refuses_and_says_why(app, redis):
    app.conf.sdtpu_max_queue = 2
    generate.delay("a")
    generate.apply_async(("a",), priority=9)
    generate.delay("a")
    with pytest.raises(
        QueueFull, match=r"2 jobs wait ahead of it in the queue 'sdtpu', at most 2 may \(sdtpu_max_q"
    ) as e:
        generate.delay("a")
    assert e.value.eta_s is None
    generate.apply_async(("a",), priority=0)  # those that wait are less urgent
    assert waiting(redis) == 4
    publish_load(redis, "sdtpu", BUSY)
    with pytest.raises(QueueFull, match="it would be done in 14 s") as e:
        generate.delay("a", num_inference_steps=50)
    assert e.value.eta_s == 3 + 3 * 2 + 50 * 0.1


def test_each_queue_has_the_limit_of_its_own(app, redis):
    app.conf.sdtpu_max_queue = 1
    generate.delay("a", tenant="acme")
    with pytest.raises(QueueFull, match=r"sdtpu\.t\d"):
        generate.delay("a", tenant="acme")
    generate.delay("a")
    generate.apply_async(("a",), queue="elsewhere")
    with pytest.raises(QueueFull, match="elsewhere"):
        generate.apply_async(("a",), queue="elsewhere")


def test_a_group_is_refused_where_the_queue_is_full(app, redis):
    app.conf.update(sdtpu_max_queue=2, broker_pool_limit=1)  # one connection: its producer's must be used
    with pytest.raises(QueueFull):
        group(generate.s("a", seed=i) for i in range(4)).delay()
    assert waiting(redis) == 2


def test_a_deadline_that_clearly_cannot_be_met_is_refused(app, redis):
    for _ in range(10):
        generate.delay("a")
    publish_load(redis, "sdtpu", BUSY)  # a start in 3 + 10 · 2 = 23 s
    for late in (15, 15.2, datetime.now(UTC) + timedelta(seconds=15), "soon"):
        expires = (datetime.now(UTC) + timedelta(seconds=15)).isoformat() if late == "soon" else late
        with pytest.raises(
            DeadlineUnreachable, match="but would have a slot only in 23 s, since 10 jobs are ahead"
        ) as e:
            generate.apply_async(("a",), {"num_inference_steps": 10}, expires=expires)
        assert e.value.eta_s == 24
    assert "it expires in 15 s" in str(e.value)
    assert waiting(redis) == 10
    for expires in (23 / MARGIN + 0.5, 60, datetime.now(UTC) + timedelta(seconds=17), None):
        generate.apply_async(("a",), expires=expires)
        redis.lpop("sdtpu\x06\x166")
    generate.apply_async(("a",), expires=1, priority=0)
    generate.apply_async(("a",), expires=1, countdown=100)  # what the queue will be like then is unknown
    generate.apply_async(("a",), expires=1, queue="elsewhere")
    assert waiting(redis) == 12


def test_without_a_report_nothing_is_refused_for_its_deadline(app, redis):
    generate.apply_async(("a",), expires=0.001)
    publish_load(redis, "sdtpu", WorkerLoad("idle", 4, {}, 8.0, {}))
    generate.apply_async(("a",), expires=0.001)


def test_a_flood_of_one_tenant_does_not_refuse_anothers_job(app, redis):
    flooded, quiet = tenant_queue("sdtpu", "flood", 16), tenant_queue("sdtpu", "quiet", 16)
    assert flooded != quiet
    redis.lpush(f"{flooded}\x06\x166", *["{}"] * 500)
    publish_load(redis, "sdtpu", BUSY)
    generate.apply_async(("a",), {"tenant": "quiet"}, expires=30)
    with pytest.raises(DeadlineUnreachable):
        generate.apply_async(("a",), {"tenant": "flood"}, expires=30)


def test_other_priority_steps_separators_and_prefixes_are_honoured(redis, redis_url):
    app = install(Celery("odd", broker=redis_url, backend=redis_url, set_as_current=False))
    app.conf.update(
        sdtpu_max_queue=2,
        broker_transport_options={"priority_steps": [0, 5], "sep": "~", "global_keyprefix": "shop:"},
    )
    task = app.tasks["sdtpu.generate"]
    for _ in range(2):
        task.delay("a")
    assert redis.llen("shop:sdtpu~5") == 2
    with pytest.raises(QueueFull, match="2 jobs wait"):
        task.delay("a")
    app.close()


@pytest.mark.parametrize("error", [QueueFull, DeadlineUnreachable])
def test_a_refusal_survives_pickle_and_the_result_backend(app, error):
    for eta_s in (None, 12.5):
        raised = error("full", eta_s)
        copy = pickle.loads(pickle.dumps(raised))
        rebuilt = app.backend.exception_to_python(app.backend.prepare_exception(raised, "json"))
        for other in (copy, rebuilt):
            assert (type(other), str(other), other.eta_s) == (error, "full", eta_s)


# --- what it costs and where it is off ---


def test_redis_is_asked_once_and_only_when_something_could_be_refused(app, redis):
    plain = commands_of_a_call(redis, lambda: generate.delay("a"))
    assert plain == ["SUBSCRIBE", "LPUSH"]
    asked = commands_of_a_call(redis, lambda: generate.apply_async(("a",), expires=60))
    assert asked == ["TIME", "HGETALL", *["LLEN"] * 17 * 4, "SUBSCRIBE", "LPUSH"]


def test_many_threads_leave_no_connections_behind(app, redis):
    app.conf.sdtpu_max_queue = 10**6
    task, errors = app.tasks["sdtpu.generate"], []

    def broker_connections() -> int:
        return sum(c["cmd"] in ("llen", "lpush", "ping", "sadd", "exec") for c in redis.client_list())

    before = broker_connections()

    def client() -> None:
        try:
            for _ in range(5):
                task.delay("a")
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=client) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert waiting(redis) == 120
    assert broker_connections() <= before + 2 * 10  # broker_pool_limit, two sockets for each of kombu's channels


def test_an_eager_app_asks_nobody():
    app = install(Celery("eager", broker="redis://127.0.0.1:1/0", backend="cache+memory://", set_as_current=False))
    app.conf.update(task_always_eager=True, sdtpu_max_queue=1)
    result = app.tasks["sdtpu.generate"].apply_async(("a",), {"tenant": "acme"}, expires=1)
    assert type(result.result).__name__ == "EngineUnavailable"
    app.close()


def test_another_broker_than_redis_has_no_admission():
    app = install(Celery("memory", broker="memory://", backend="cache+memory://", set_as_current=False))
    app.conf.sdtpu_max_queue = 1
    for _ in range(3):
        app.tasks["sdtpu.generate"].apply_async(("a",), expires=1)
    app.close()


def test_a_user_who_may_not_read_the_load_enqueues_without_it(redis, redis_url, caplog):
    url = redis_url.replace("://", "://plain:pw@")
    redis.acl_setuser("plain", enabled=True, passwords=["+pw"], categories=["+@all"], keys=["sdtpu*", "_kombu*"],
                      commands=["-hgetall"], channels=["*"])  # fmt: skip
    app = install(Celery("acl", broker=url, backend=url, set_as_current=False))
    app.conf.sdtpu_max_queue = 1
    for _ in range(2):
        app.tasks["sdtpu.generate"].delay("a")
    assert "the job is enqueued without a check" in caplog.text
    assert "pw" not in caplog.text
    app.close()
    redis.acl_deluser("plain")


# --- tenants ---


def test_a_tenant_has_the_same_queue_everywhere():
    assert shard_queues("q", 3) == ["q", "q.t0", "q.t1", "q.t2"]
    assert shard_queues("q", 0) == ["q"]
    assert tenant_queue("sdtpu", "acme", 16) == "sdtpu.t0"
    assert tenant_queue("sdtpu", None, 16) == tenant_queue("sdtpu", "acme", 0) == "sdtpu"
    assert {tenant_queue("q", f"tenant {i}", 4) for i in range(100)} == {"q.t0", "q.t1", "q.t2", "q.t3"}


def test_a_tenants_job_goes_to_the_tenants_queue_and_keeps_its_name(app, redis):
    generate.delay("a", tenant="acme")
    generate.s("a", tenant="acme").apply_async(priority=0)
    generate.apply_async(("a",), {"tenant": "acme"}, queue="sdtpu")
    assert waiting(redis, "sdtpu.t0") == 3
    generate.apply_async(("a",), {"tenant": "acme"}, queue="elsewhere")
    generate.delay("a")
    assert (waiting(redis, "elsewhere"), waiting(redis)) == (1, 1)
    app.conf.sdtpu_tenant_shards = 0
    generate.delay("a", tenant="acme")
    assert waiting(redis) == 2
    message = json.loads(redis.lindex("sdtpu.t0\x06\x166", 0))
    assert "'tenant': 'acme'" in message["headers"]["kwargsrepr"]
    for call in (lambda: generate.delay("a", tenant=""), lambda: generate.s("a", tenant=3)):
        with pytest.raises(InvalidRequest, match="tenant"):
            call()


def test_the_tenant_changes_nothing_else():
    request = GenerationRequest.parse(("a",), {"tenant": "acme", "seed": 1})
    assert "tenant" not in request.to_json()


@pytest.mark.parametrize("queue", ["sdtpu", "sdtpu.t3"])
def test_a_retry_goes_to_the_queue_that_it_came_from_and_is_never_refused(app, redis, queue):
    app.conf.sdtpu_max_queue = 1
    redis.lpush(f"{queue}\x06\x166", "{}")
    publish_load(redis, "sdtpu", BUSY)
    task = app.tasks["sdtpu.generate"]
    _state._task_stack.push(task)
    task.push_request(
        id="it", args=["a"], kwargs={"tenant": "acme", "seed": 1}, retries=0, called_directly=False, is_eager=False,
        delivery_info={"exchange": "", "routing_key": queue, "priority": 6, "redelivered": False},
        expires=(datetime.now(UTC) + timedelta(seconds=1)).isoformat(),
    )  # fmt: skip
    try:
        with pytest.raises(Retry):
            task.retry(countdown=0, throw=True)
    finally:
        task.pop_request()
        _state._task_stack.pop()
    assert waiting(redis, queue) == 2
    assert json.loads(redis.lindex(f"{queue}\x06\x166", 0))["headers"]["id"] == "it"


def test_inside_a_worker_nothing_is_refused_or_raised(app, redis):
    app.conf.sdtpu_max_queue = 1
    task = app.tasks["sdtpu.generate"]
    _state._task_stack.push(task)
    try:
        for tenant in ("acme", "acme", 7, None, "\ud800"):
            task.apply_async(("a",), {"tenant": tenant})
    finally:
        _state._task_stack.pop()
    assert waiting(redis, "sdtpu.t0") == 2
    assert sum(waiting(redis, queue) for queue in shard_queues("sdtpu", 16)) == 5
