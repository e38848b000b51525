"""What a client puts into the queue: one ordinary Celery message for each job, validated before."""

from __future__ import annotations

import base64
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery, group

from sdtpu_worker import BrokerUnavailable, EngineUnavailable, InvalidRequest, QueueFull, generate, generate_many
from sdtpu_worker.client import once
from sdtpu_worker.testing.processes import free_port
from tests.support.clients import client_app

pytestmark = pytest.mark.usefixtures("redis")


def queued(app: Celery) -> list[dict]:
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        queues = [channel._q_for_pri("sdtpu", band) for band in channel.priority_steps]
        return [json.loads(message) for queue in queues for message in channel.client.lrange(queue, 0, -1)]


def test_delay_enqueues_one_json_message_with_a_drawn_seed(app):
    first, second = generate.delay("a fox"), generate.delay("a fox", seed=7)
    messages = {message["properties"]["correlation_id"]: message for message in queued(app)}
    assert set(messages) == {first.id, second.id}
    assert all(message["content-type"] == "application/json" for message in messages.values())
    kwargs = json.loads(messages[first.id]["headers"]["kwargsrepr"].replace("'", '"'))
    assert 0 <= kwargs["seed"] < 2**53


def test_a_bad_parameter_is_refused_and_nothing_is_enqueued(app):
    for call in (
        lambda: generate.delay(""),
        lambda: generate.apply_async(("a",), {"sampler": "x"}),
        lambda: generate.s("a", seed=-1),
        lambda: generate.si("a", image_format="bmp"),
        lambda: group(generate.s("good"), generate.s("a", num_inference_steps=0)).delay(),
        lambda: generate.s().delay(),
    ):
        with pytest.raises(InvalidRequest):
            call()
    assert queued(app) == []


def test_priority_countdown_expires_and_another_queue_pass_through(app):
    generate.apply_async(("a",), {"seed": 1}, priority=0, expires=60, task_id="mine")
    (message,) = queued(app)
    assert message["headers"]["id"] == "mine"
    assert message["headers"]["expires"]
    generate.apply_async(("a",), {"seed": 1}, queue="elsewhere")
    assert len(queued(app)) == 1


def test_the_queue_is_configurable(app, monkeypatch):
    monkeypatch.setenv("SDTPU_QUEUE", "elsewhere")
    generate.delay("a")
    assert queued(app) == []


def test_a_redis_that_is_not_there_is_a_clear_error():
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    with client_app(url, "cache+memory://"):
        with pytest.raises(BrokerUnavailable, match="was not enqueued: Redis at redis://") as caught:
            generate.apply_async(("a",), retry=False)
    assert "secret" not in str(caught.value)


def test_a_database_of_results_that_is_not_there_is_a_clear_error(redis_url, tmp_path, monkeypatch):
    monkeypatch.setattr("celery.backends.database.session.PREPARE_MODELS_MAX_RETRIES", 0)
    folder = tmp_path / "folder"
    place = f"db+sqlite:///{folder}/results.sqlite"
    with client_app(redis_url, place):
        with pytest.raises(BrokerUnavailable, match="unable to open database file") as caught:
            generate.delay("a")
        assert f"the job was not enqueued: the result backend at {place} cannot be reached" in str(caught.value)
        folder.mkdir()
        assert generate.delay("a").state == "PENDING"


def test_a_call_outside_a_device_worker_says_what_to_do(app):
    result = generate.apply(("a fox",))
    assert isinstance(result.result, EngineUnavailable)
    assert "DevicePool" in str(result.result)


def test_several_pictures_of_one_prompt_are_a_group_with_seeds_in_a_row(app):
    results = generate_many("a fox", 3, seed=7, num_inference_steps=4, options={"priority": 3})
    assert len(results) == 3
    messages = {message["headers"]["id"]: message for message in queued(app)}
    sent = [json.loads(base64.b64decode(messages[result.id]["body"])) for result in results]
    assert [args for args, *_ in sent] == [["a fox"]] * 3
    assert [kwargs for _, kwargs, _ in sent] == [{"seed": 7 + i, "num_inference_steps": 4} for i in range(3)]
    assert {message["properties"]["priority"] for message in messages.values()} == {3}
    assert len({message["headers"]["group"] for message in messages.values()}) == 1


def test_many_pictures_without_a_seed_get_one_that_leaves_room(app):
    seeds = []
    for result in generate_many("a fox", 2):
        message = next(each for each in queued(app) if each["headers"]["id"] == result.id)
        seeds.append(json.loads(base64.b64decode(message["body"]))[1]["seed"])
    assert seeds[1] == seeds[0] + 1 < 2**53


@pytest.mark.parametrize(
    ("n", "more", "text"),
    [
        (0, {}, "n must be an integer from 1 to 1,000, got 0"),
        (1001, {}, "n must be an integer"),
        (True, {}, "n must be an integer"),
        (2, {"seed": 2**63 - 1}, "so that 2 seeds fit"),
        (2, {"sampler": "x"}, "sampler"),
        (2, {"seed": "7"}, "seed must be an integer"),
    ],
)
def test_many_pictures_with_a_bad_parameter_enqueue_nothing(app, n, more, text):
    with pytest.raises(InvalidRequest, match=text):
        generate_many("a fox", n, **more)
    assert queued(app) == []


def test_a_repeated_call_with_an_idempotency_key_returns_the_first_job(app, redis):
    first = generate.delay("a fox", idempotency_key="order-7")
    again = generate.delay("a fox", idempotency_key="order-7")
    assert again.id == first.id
    (message,) = queued(app)
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert set(kwargs) == {"seed"}, "the message does not carry it"
    others = [
        generate.delay("a fox", idempotency_key="order-8"),
        generate.delay("a fox", idempotency_key="order-7", tenant="another"),
        generate.delay("a fox"),
    ]
    assert len({first.id, *(other.id for other in others)}) == 4
    with pytest.raises(InvalidRequest, match="idempotency_key must be a new one for other parameters, got 'order-7'"):
        generate.delay("a bear", idempotency_key="order-7")
    for key in redis.keys("sdtpu:once:*"):
        assert redis.ttl(key) > 3600


def test_a_job_that_was_not_enqueued_leaves_its_key_free(app, redis, monkeypatch):
    with pytest.raises(InvalidRequest, match="sampler"):
        generate.delay("a fox", sampler="x", idempotency_key="order-9")
    monkeypatch.setitem(app.conf, "sdtpu_max_queue", 1)
    generate.delay("a fox")
    with pytest.raises(QueueFull):
        generate.delay("a fox", idempotency_key="order-9")
    assert not redis.keys("sdtpu:once:*")
    monkeypatch.setitem(app.conf, "sdtpu_max_queue", 0)
    assert generate.delay("a fox", idempotency_key="order-9").id


@pytest.mark.parametrize("key", ["", "x" * 129, 7, "a\nb"])
def test_a_key_that_is_none_is_refused(app, key):
    with pytest.raises(InvalidRequest, match="idempotency_key must be a name of 1 to 128 characters"):
        generate.delay("a fox", idempotency_key=key)


def test_a_key_that_expires_between_two_looks_is_not_taken_from_the_client_that_was_quicker(app, monkeypatch):
    class Expiring:
        """The key is taken, has expired when it is read, and is taken by another client before it is set again."""

        def set(self, name, note, nx=False, ex=None):
            self.digest = note.split()[1]
            return not nx

        def get(self, name):
            task_id = next(ids)
            return task_id and f"{task_id} {self.digest}".encode()

    ids = iter([None, "another"])
    monkeypatch.setattr(once, "broker_with_prefix", lambda app: contextlib.nullcontext((Expiring(), "")))
    assert generate.delay("a fox", idempotency_key="order-11").id == "another"
    assert queued(app) == []


def test_two_calls_at_the_same_time_make_one_job(app):
    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda _: generate.delay("a fox", idempotency_key="order-10").id, range(16)))
    assert len(ids) == len(queued(app)) == 1
