"""Celery's remote control: commands outside their own error handling, and those that make no sense for devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery.worker import control

from sdtpu_worker import ConfigurationError
from sdtpu_worker.worker.pool import DevicePool
from sdtpu_worker.worker.remote_control import guard


class Consumer:
    """As much of Celery's as the commands reach."""

    def __init__(self) -> None:
        self.calls, self.deselected = [], []
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=SimpleNamespace(deselect=self.deselected.append)))

    def add_task_queue(self, *args, **options) -> None:
        if options:
            raise TypeError("no such option")
        self.calls.append(("add", *args))

    def cancel_task_queue(self, queue) -> None:
        self.calls.append(("cancel", queue))


@pytest.fixture
def consumer():
    consumer = Consumer()
    guard(consumer)
    return consumer


def test_sound_commands_do_what_they_do(consumer):
    consumer.add_task_queue("other", None, "direct", None)
    consumer.cancel_task_queue("other")
    assert consumer.calls == [("add", "other", None, "direct", None), ("cancel", "other")]


@pytest.mark.parametrize("name", [7, [], {}, None, "", "x" * 300, True])
def test_a_queue_that_has_no_name_is_neither_added_nor_cancelled(consumer, name, caplog):
    consumer.add_task_queue(name, None, "direct", None)
    consumer.cancel_task_queue(name)
    assert consumer.calls == []
    assert "must be a name" in caplog.text


@pytest.mark.parametrize("fields", [([], "direct", None), (None, "nonesuch", None), (None, [], None), (None, None, {})])
def test_nor_is_one_with_a_wrong_exchange_or_key(consumer, fields):
    consumer.add_task_queue("other", *fields)
    assert consumer.calls == []


def test_a_queue_that_cannot_be_consumed_is_not_kept(consumer, caplog):
    consumer.add_task_queue("other", None, "direct", None, x=1)
    assert consumer.deselected == ["other"]
    assert "cannot be consumed" in caplog.text


@pytest.mark.parametrize("command", [control.pool_grow, control.pool_shrink])
def test_a_device_worker_says_why_it_does_not_grow_or_shrink(command):
    """Flower's buttons ended in an AttributeError."""
    consumer = SimpleNamespace(pool=DevicePool(1), controller=SimpleNamespace(autoscaler=None))
    with pytest.raises(ConfigurationError, match="set sdtpu_slots_per_device and restart it, or start more workers"):
        command(SimpleNamespace(consumer=consumer), n=2)
