"""What passes the envelope, Celery's own consumer can handle; what a Celery client sends passes it."""

from __future__ import annotations

import base64
import copy
import json
import random
import time
import uuid
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery, _state, chain, chord, group, states
from celery.exceptions import NotRegistered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Queue
from kombu.asynchronous.timer import Timer
from kombu.utils import json as kombu_json

import sdtpu_worker.client.task  # noqa: F401  registers sdtpu.generate with every app
from sdtpu_worker.delivery.envelope import BadEnvelope, check_envelope, find_task_id, is_usable_id
from sdtpu_worker.errors import EngineUnavailable, InvalidMessage, InvalidRequest
from tests.support.hostile import KINDS, MAX_BYTES, REQUEST, WRONG, Draft, hostile_messages

QUEUE = "envelope"
KNOWN = {"sdtpu.generate", "probe"}


class Consumer:
    """Celery's own consumer, strategy, request and trace over kombu's Redis channel, in this thread, without a loop.

    A message is delivered as the Redis transport does it once it has read the list. Jobs with an eta run at once.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        worker = app.WorkController(pool="solo", concurrency=1, queues=[QUEUE], use_eventloop=False, hostname="w@test")
        self.consumer = consumer = worker.consumer
        worker.pool.start()
        consumer.controller = worker
        consumer.connection = app.connection_for_read()
        consumer.event_dispatcher = app.events.Dispatcher(consumer.connection, hostname="w@test", enabled=True)
        consumer.timer = SimpleNamespace(call_at=self._run_now)
        consumer.qos = SimpleNamespace(increment_eventually=lambda: None, decrement_eventually=lambda: None)
        consumer.update_strategies()
        consumer.task_consumer = app.amqp.TaskConsumer(consumer.connection, on_decode_error=consumer.on_decode_error)
        consumer.task_consumer.on_message = consumer.create_task_handler()
        consumer.task_consumer.consume()
        self.channel = consumer.task_consumer.channel
        self.timer = Timer()

    def _run_now(self, eta: float, function: Any, args: Any, priority: int) -> Any:
        entry = self.timer.call_at(eta, function, args, priority=priority)
        self.timer.cancel(entry)
        function(*args)
        return entry

    def deliver(self, message: dict[str, Any]) -> None:
        message["properties"]["delivery_tag"] = str(uuid.uuid4())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.channel.connection._deliver(message, QUEUE)

    def unacknowledged(self) -> int:
        self.channel.qos._flush()
        return len(self.channel.qos._delivered)

    def close(self) -> None:
        self.consumer.connection.close()


@pytest.fixture(scope="module")
def app(redis_url):
    app = Celery("envelope", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, worker_pool="solo", task_publish_retry=False, sdtpu_queue=QUEUE)
    app.conf.task_queues = [Queue(QUEUE)]

    @app.task(name="probe", bind=True, acks_late=True)
    def probe(self, *args: Any, fail: bool = False, **kwargs: Any) -> int:
        if fail:
            raise ValueError("as told")
        return len(args)

    before = _state._tls.current_app
    app.set_current()
    yield app
    _state._set_current_app(before)
    app.close()


@pytest.fixture(scope="module")
def client(redis_url):
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def consumer(app):
    consumer = Consumer(app)
    yield consumer
    consumer.close()
    _state._set_task_join_will_block(False)  # what a worker sets in its process


@pytest.fixture(scope="module")
def take(client):
    """Give a function that takes what stands in the queue, of whatever priority."""

    def take() -> list[bytes]:
        raws = []
        for key in sorted(client.keys(f"{QUEUE}*")):
            if client.type(key) == b"list":
                while raw := client.rpop(key):
                    raws.append(raw)
        return raws

    take()
    return take


def refuse(raw: bytes, known=KNOWN, max_bytes: int = MAX_BYTES) -> BadEnvelope:
    with pytest.raises(BadEnvelope) as caught:
        check_envelope(raw, known, max_bytes)
    return caught.value


def draft() -> Draft:
    return Draft(random.Random(0))


# What clients send.


def send_everything(app: Celery) -> None:
    """Send every sort of message that Celery's clients can send with the JSON serializer."""
    probe, generate = app.tasks["probe"], app.tasks["sdtpu.generate"]
    now = datetime.now(UTC)
    sub = probe.s(2).set(queue=QUEUE, priority=3, countdown=1, time_limit=9)
    generate.delay("a red circle", seed=2**63 - 1, num_inference_steps=3)
    generate.apply_async(("ein Bild von 北京 ☃",), {"negative_prompt": "\\ \" ' [{,}]"}, priority=0)
    generate.apply_async(("[" * 10_000,), {"negative_prompt": "{," * 5_000})
    for options in (
        {"countdown": 10},
        {"eta": now + timedelta(days=400)},
        {"eta": datetime(2031, 5, 4)},
        {"expires": 60},
        {"expires": 0.5},
        {"expires": now + timedelta(hours=1)},
        {"expires": datetime(9998, 1, 1)},
        {"priority": 9},
        {"retries": 3},
        {"time_limit": 60, "soft_time_limit": 50.5},
        {"headers": {"tenant": "a", "when": now, "price": 1.5, "deep": {"list": [1, None]}, "_private": 1}},
        {"headers": {"headers": {"sentry-trace": "00-1"}, "__django_structlog__": {"request_id": "1"}}},
        {"shadow": "probe of a shop (naïve)"},
        {"ignore_result": True},
        {"compression": "gzip"},
        {"compression": "zlib", "headers": {"a": 1}},
        {"task_id": "../../x"},
        {"link": sub, "link_error": sub},
        {"link": [sub, chain(sub, group(sub, sub), sub)], "link_error": [probe.si(), group(probe.s(), probe.s())]},
        {"link": probe.s().set(eta=now, expires=now + timedelta(1), stamped_headers=["user"], user="me")},
        {"reply_to": "somewhere", "correlation_id": "mine", "delivery_mode": 1, "app_id": "shop"},
        {"argsrepr": "(…)", "kwargsrepr": "<secret>"},
        {"stamped_headers": ["user"], "user": ["a", "b"]},
        {"group_id": "some-group", "group_index": 4, "root_id": "root", "parent_id": "parent"},
        {"replaced_task_nesting": 2},
        {"serializer": "json", "content_type": None},
    ):
        probe.apply_async((1, now.date(), uuid.uuid4(), b"\xff\x00"), {"x": [now]}, **{"queue": QUEUE, **options})
    several = [probe.s(1), group(probe.s(), probe.s()), chain(probe.s(), probe.s())]
    for errbacks in ([probe.si()], several, [chord([sub], sub)]):
        probe.apply_async(kwargs={"fail": True}, link_error=errbacks)
        chain(probe.s(fail=True).set(link_error=errbacks), probe.s(), group(probe.s(), sub), sub).apply_async()
        chord([probe.s(fail=True), probe.s()], probe.s().set(link_error=errbacks)).apply_async()
    chain(probe.s(1), probe.s(2), generate.s(num_inference_steps=2)).apply_async()
    chain(generate.s("a circle"), group(probe.s(1), chain(probe.s(2), probe.s(3))), probe.s(4)).apply_async()
    group(generate.s("a circle"), generate.s("a square").set(priority=1)).apply_async()
    chord([generate.s("a circle"), probe.s()], probe.s().on_error(probe.si())).apply_async()
    chord([chord([probe.s()] * 2, probe.s()), group(probe.s(), probe.s())], probe.s()).apply_async()
    probe.chunks([(1,), (2,)], 1).apply_async(queue=QUEUE)
    probe.map([1, 2]).apply_async(queue=QUEUE)
    probe.starmap([(1, 2)]).apply_async(queue=QUEUE)
    stamped = chain(probe.s(), group(probe.s(), probe.s()), probe.s())
    stamped.stamp(campaign="spring")
    stamped.apply_async()
    app.send_task("probe", (1,), {"a": {"b": [None, True, 1e-9, 2**70]}})


@pytest.mark.parametrize("headers", ["left out", None, [], {}])
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_client_in_another_language_may_write_null_for_nothing(app, consumer, headers, protocol):
    """gocelery and others leave headers out, or write null or `[]`, and null for no kwargs; their clients hung."""
    sound = Draft(random.Random(f"{protocol} {headers}"))
    sound.args, sound.kwargs, sound.headers["task"] = [1, 2], None, "probe"
    if protocol == 1:
        sound.to_protocol_1()
        sound.message["headers"] = headers
        if headers == "left out":
            del sound.message["headers"]
    else:
        sound.body = [sound.args, sound.kwargs, None]
    message = check_envelope(sound.encode(), KNOWN, MAX_BYTES)
    consumer.deliver(message)
    assert app.backend.get_task_meta(sound.task_id)["result"] == 2
    app.backend.forget(sound.task_id)


@pytest.fixture(scope="module")
def client_messages(app, take):
    """Give the raw messages of both protocols."""
    raws = []
    for protocol in (2, 1):
        app.conf.task_protocol = protocol
        app.amqp.__dict__.pop("create_task_message", None)
        app.amqp.__dict__.pop("send_task_message", None)
        send_everything(app)
        raws += take()
    app.conf.task_protocol = 2
    app.amqp.__dict__.pop("create_task_message", None)
    return raws


def test_what_celerys_clients_send_is_accepted_unchanged(app, client_messages):
    protocols = Counter("task" in json.loads(raw)["headers"] for raw in client_messages)
    assert min(protocols[True], protocols[False]) > 35
    for raw in client_messages:
        assert check_envelope(raw, app.tasks, MAX_BYTES) == kombu_json.loads(raw)


def test_what_a_worker_sends_is_accepted_too(app, consumer, take, client_messages):
    sent = list(client_messages)
    for _ in range(6):  # retries, the next of a chain, callbacks and error callbacks of callbacks
        for raw in sent:
            consumer.deliver(check_envelope(raw, app.tasks, MAX_BYTES))
        sent = take()
        for raw in sent:
            assert check_envelope(raw, app.tasks, MAX_BYTES) == kombu_json.loads(raw)
    assert consumer.unacknowledged() == 0


def test_a_message_that_kombu_restored_is_accepted(app, consumer, take, client):
    app.send_task("probe", (1,))
    (raw,) = take()
    message = check_envelope(raw, KNOWN, MAX_BYTES)
    tag = message["properties"]["delivery_tag"] = str(uuid.uuid4())
    consumer.channel.qos.append(consumer.channel.Message(message, channel=consumer.channel), tag)
    consumer.channel.qos.reject(tag, requeue=True)
    (restored,) = take()
    message = check_envelope(restored, KNOWN, MAX_BYTES)
    assert message["headers"]["redelivered"] is True
    assert message["properties"]["delivery_info"]["redelivered"] is True


# What Celery does with what is accepted.


def test_a_sound_message_runs(app, consumer):
    sound = draft()
    consumer.deliver(check_envelope(sound.encode(), KNOWN, MAX_BYTES))
    assert isinstance(app.AsyncResult(sound.task_id).result, EngineUnavailable)  # no engine in this process


@pytest.mark.parametrize("encoding", ["utf-8", None])
def test_a_body_may_stand_there_as_it_is(app, consumer, encoding):
    sound = draft()
    sound.properties["body_encoding"] = encoding
    sound.message["body"] = json.dumps(sound.body)
    sound.headers["id"] = task_id = str(uuid.uuid4())
    consumer.deliver(check_envelope(sound.encode(), KNOWN, MAX_BYTES))
    assert isinstance(app.AsyncResult(task_id).result, EngineUnavailable)


def test_every_hostile_message_is_refused_or_fails_as_it_was_made_to():
    """What is refused is known by its id, if it has one; what passes has a parameter that is not allowed."""
    messages = list(hostile_messages(seed=3, count=20_000))
    wrong: list[tuple[Any, ...]] = []
    started = time.process_time()
    for message in messages:
        try:
            check_envelope(message.raw, KNOWN, MAX_BYTES)
        except BadEnvelope as exc:
            typed = isinstance(exc.error, InvalidMessage | NotRegistered) and "\n" not in exc.reason
            if message.kind.startswith(REQUEST) or exc.task_id != message.task_id or not typed:
                wrong.append((message.kind, exc.task_id, message.task_id, exc.reason))
        else:
            if not message.kind.startswith(REQUEST):
                wrong.append((message.kind, "was accepted", message.raw[:300]))
    assert wrong == []
    assert {message.kind for message in messages} == {kind.name for kind in KINDS}
    assert time.process_time() - started < 20  # 3 s


def test_a_parameter_that_is_not_allowed_passes_the_envelope_and_fails_in_the_task(app, consumer):
    messages = [message for message in hostile_messages(seed=4, count=1500) if message.kind.startswith(REQUEST)]
    assert len(messages) > 100
    for message in messages:
        consumer.deliver(check_envelope(message.raw, KNOWN, MAX_BYTES))
        result = app.AsyncResult(message.task_id).result
        assert type(result) is InvalidRequest, message.kind
    assert consumer.unacknowledged() == 0


def test_the_generator_is_seeded_and_moderate():
    first, again = (list(hostile_messages(seed=9, count=3000)) for _ in range(2))
    assert first == again
    assert sum(len(message.raw) for message in first) / len(first) < 3 * 1024
    assert any(message.task_id is None for message in first)


DATES = (
    "2030-01-01",
    "2030-01-01T00:00:00+23:59",
    "9999-11-30T00:00:00-23:59",
    "1970-01-02",
    "20300101T00Z",
    "2030-W01",
)
SIGNATURE = {"task": "probe", "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}
JUNK = (
    *(None, True, False, 0, 1, -1, 3, 255, 1.5, 1e300, 10**20, "", "x", "probe", "id", "args", QUEUE, "a\nb", [], {}),
    *([None], [None, 1], [1, 2], ["x"], [[]], {"x": 1}, {"task": "probe"}, SIGNATURE, [SIGNATURE], *DATES),
    *(value for names in WRONG.values() for values in names.values() for value in values),
)
NAMES = sorted(
    {name for names in WRONG.values() for name in names} | {"id", "args", "kwargs", "tasks", "body", "header"}
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) within a JSON value."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            found += [(item, key) for key in keys]
            waiting += [item[key] for key in keys]
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_is_accepted_becomes_a_request_and_ends(app, consumer, take, client_messages, data):
    raw = data.draw(st.sampled_from(client_messages))
    message = json.loads(raw)
    if "compression" in message["headers"] or len(raw) > 20_000:
        return
    message["body"] = json.loads(base64.b64decode(message["body"]))
    whole = {"message": message}
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(whole)[1:]))
        action = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "delete":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(st.sampled_from(NAMES))] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        else:
            container[key] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        if not places(whole)[1:]:
            return
    message = whole["message"]
    if isinstance(message, dict) and isinstance(message.get("body"), dict | list):
        message["body"] = base64.b64encode(json.dumps(message["body"]).encode()).decode()
    task_id = f"t-{uuid.uuid4()}"
    raw = json.dumps(message).encode()
    try:
        envelope = check_envelope(raw, app.tasks, MAX_BYTES)
    except BadEnvelope:
        return
    headers = envelope["headers"]
    if "task" in headers:
        headers["id"] = task_id
    else:
        task_id = headers.get("id") or kombu_json.loads(base64.b64decode(envelope["body"]))["id"]
        app.AsyncResult(task_id).forget()
    consumer.deliver(envelope)
    ignored = headers.get("ignore_result")
    assert ignored or app.AsyncResult(task_id).state in states.READY_STATES
    assert consumer.unacknowledged() == 0
    take()


# Single rules.


def test_a_message_above_the_limit_is_refused_with_the_numbers_and_its_id():
    sound = draft()
    raw = sound.encode()
    assert check_envelope(raw, KNOWN, len(raw))
    refused = refuse(raw, max_bytes=len(raw) - 1)
    assert refused.task_id == sound.task_id
    assert refused.reason == f"the message must have at most {len(raw) - 1:,} bytes, got {len(raw):,}"


def test_a_task_that_the_app_has_not_is_named():
    sound = draft()
    refused = refuse(sound.encode(), known={"other"})
    assert isinstance(refused.error, NotRegistered)
    assert (refused.task_name, refused.task_id, refused.ignore_result) == ("sdtpu.generate", sound.task_id, False)


def test_a_client_that_wants_no_result_is_known():
    sound = draft()
    sound.headers.update(ignore_result=True, eta="soon")
    refused = refuse(sound.encode())
    assert refused.ignore_result
    assert refused.reason == "headers: eta must be an ISO 8601 date from 1970 to 9999 or null, got 'soon'"


def test_an_inflated_body_is_bounded():
    sound = draft()
    sound.headers["compression"] = "application/x-gzip"
    body = json.dumps(sound.body).encode()
    packed = zlib.compress(body + b" " * (10_000 - len(body)))
    raw = sound.encode(packed)
    assert check_envelope(raw, KNOWN, 10_000)
    assert "inflated" in refuse(raw, max_bytes=9_999).reason


@pytest.mark.parametrize("value", ["x", "../../x", "a b", "naïve ☃", "x" * 255])
def test_a_usable_id(value):
    assert is_usable_id(value)
    raw = json.dumps({"headers": {"id": value}, "properties": {"correlation_id": value}}).encode()
    assert find_task_id(raw[:60], raw[-300:]) == value


@pytest.mark.parametrize("value", ["", "x" * 256, "a\n", "\x00", "\ud800", "\u200b", None, 7, ["x"]])
def test_an_id_that_cannot_be_used(value):
    assert not is_usable_id(value)
    raw = json.dumps({"headers": {"id": value}, "properties": {"correlation_id": value}}).encode()
    assert find_task_id(raw[:9000], raw[-9000:]) is None


def test_an_id_is_guessed_only_if_all_that_looks_like_one_agrees():
    assert find_task_id(b'{"headers": {"id": "a"', b'"correlation_id": "a"}}') == "a"
    assert find_task_id(b'{"headers": {"id": "a"', b'"correlation_id": "b"}}') is None
    assert find_task_id(b'{"kwargsrepr": "\\"id\\": \\"b\\"", "id": "a"', b"") == "a"
    assert find_task_id(b'"id": "', b'"id": 7') is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000) | st.text(max_size=500).map(str.encode))
def test_nothing_but_bad_envelope_is_ever_raised(raw):
    with suppress(BadEnvelope):
        check_envelope(raw, KNOWN, MAX_BYTES)
    find_task_id(raw[:100], raw[-100:])


@pytest.mark.parametrize("part", [b"[", b"[1,", b"{},", b'{"a":', b"1", b'"id":"', b'"', b"\\", b"\xff"])
def test_the_largest_messages_are_refused_quickly(part):
    best = min(_seconds(part * (MAX_BYTES // len(part))) for _ in range(5))
    assert best < 0.02


def _seconds(raw: bytes) -> float:
    started = time.perf_counter()
    refuse(raw)
    return time.perf_counter() - started
