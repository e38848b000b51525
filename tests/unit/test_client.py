"""The client side: light, validated where the job is enqueued, and an ordinary Celery task."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from celery import Celery, group

import sdtpu_worker
from sdtpu_worker import BrokerUnavailable, InvalidRequest, generate, install


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def app(redis_url):
    app = install(Celery("test-client", broker=redis_url, backend=redis_url, set_as_current=True))
    yield app
    with app.connection_for_write() as connection:
        connection.default_channel.client.flushdb()
    app.close()


def queued(app: Celery) -> list[dict]:
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        queues = [channel._q_for_pri("sdtpu", band) for band in channel.priority_steps]
        return [json.loads(message) for queue in queues for message in channel.client.lrange(queue, 0, -1)]


def test_importing_the_package_creates_no_celery_app():
    code = "import sdtpu_worker.client.task, sdtpu_worker.plugin, celery; print(len(celery._state._get_active_apps()))"
    assert run_python(code) == "0"


def test_the_public_names_are_these():
    assert sorted(sdtpu_worker.__all__) == [
        "BrokerUnavailable",
        "ConfigurationError",
        "DeadlineUnreachable",
        "DeliveryLimitExceeded",
        "EngineUnavailable",
        "GenerationFailed",
        "GenerationRequest",
        "GenerationResult",
        "InvalidCheckpoint",
        "InvalidMessage",
        "InvalidRequest",
        "Overloaded",
        "QueueFull",
        "SdtpuError",
        "StorageError",
        "generate",
        "image_content_type",
        "image_grid",
        "install",
        "open_image",
        "read_image_bytes",
    ]
    for name in sdtpu_worker.__all__:
        assert getattr(sdtpu_worker, name).__doc__
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = sdtpu_worker.nothing_like_it


def test_delay_enqueues_one_json_message_with_a_drawn_seed(app):
    first, second = generate.delay("a fox"), generate.delay("a fox", seed=7)
    messages = {message["properties"]["correlation_id"]: message for message in queued(app)}
    assert set(messages) == {first.id, second.id}
    assert all(message["content-type"] == "application/json" for message in messages.values())
    kwargs = json.loads(messages[first.id]["headers"]["kwargsrepr"].replace("'", '"'))
    assert 0 <= kwargs["seed"] < 2**63


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
    from sdtpu_worker.testing.processes import free_port

    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    app = install(Celery("no-redis", broker=url, backend="cache+memory://", set_as_current=False))
    task = app.tasks["sdtpu.generate"]
    with pytest.raises(BrokerUnavailable, match="was not enqueued: Redis at redis://") as caught:
        task.apply_async(("a",), retry=False)
    assert "secret" not in str(caught.value)
    app.close()


def test_a_call_outside_a_device_worker_says_what_to_do(app):
    from sdtpu_worker import EngineUnavailable

    result = generate.apply(("a fox",))
    assert isinstance(result.result, EngineUnavailable)
    assert "DevicePool" in str(result.result)
