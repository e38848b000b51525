"""Which workers of an app hold devices, and what they consume."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from celery import Celery
from celery.concurrency import get_implementation
from celery.signals import worker_init
from kombu import Queue

import sdtpu_worker.app
from sdtpu_worker import install
from sdtpu_worker.client.routing import device_queues
from sdtpu_worker.plugin import POOL, is_device_worker


def app_of(**conf: Any) -> Celery:
    app = install(Celery("shop", broker="memory://", set_as_current=False))
    app.conf.update(conf)
    return app


def pool_of(app: Celery, *chosen: str, pool: str | None = None) -> str:
    """Return the pool that a worker gets which consumes `chosen` (-Q) and is given `pool` by the code that makes it."""
    app.amqp.queues.select(chosen)
    worker = type("Worker", (), {"app": app, "pool_cls": pool or app.conf.worker_pool})()
    worker_init.send(sender=worker)
    cls = get_implementation(worker.pool_cls)
    return f"{cls.__module__}.{cls.__qualname__}"


PREFORK, DEVICES = "celery.concurrency.prefork.TaskPool", "sdtpu_worker.worker.pool.DevicePool"


@pytest.mark.parametrize(
    ("conf", "chosen", "pool"),
    [
        ({}, (), PREFORK),
        ({}, ("celery",), PREFORK),
        ({}, ("sdtpu",), DEVICES),
        ({}, ("sdtpu.t3",), DEVICES),
        ({}, ("mail", "sdtpu"), DEVICES),
        ({"worker_pool": "threads"}, ("sdtpu",), DEVICES),
        ({"worker_pool": "threads"}, (), "celery.concurrency.thread.TaskPool"),
        ({"worker_pool": POOL}, (), DEVICES),
        ({"worker_pool": POOL}, ("mail",), PREFORK),
        ({"sdtpu_queue": "art"}, ("sdtpu",), PREFORK),
        ({"sdtpu_queue": "art"}, ("art",), DEVICES),
        ({"task_default_queue": "sdtpu"}, (), DEVICES),
        ({"task_queues": [Queue("sdtpu", routing_key="sdtpu")]}, (), DEVICES),
        ({"task_queues": [Queue("sdtpu", routing_key="sdtpu"), Queue("celery", routing_key="celery")]}, (), PREFORK),
        ({"task_routes": {"sdtpu.generate": {"queue": "gpu"}}}, ("gpu",), DEVICES),
        ({"task_routes": {"*": {"queue": "web"}}}, ("web",), PREFORK),
        ({"task_routes": [lambda name, *_, **__: {"queue": "web"}]}, ("web",), PREFORK),
        ({"task_annotations": {"sdtpu.generate": {"queue": "gpu"}}}, ("gpu",), DEVICES),
    ],
)
def test_the_queues_that_a_worker_consumes_decide_whether_it_holds_devices(conf, chosen, pool):
    assert pool_of(app_of(**conf), *chosen) == pool


def test_a_pool_that_code_asks_for_is_left_alone_for_the_boot_step_to_refuse():
    assert pool_of(app_of(), "sdtpu", pool="solo") == "celery.concurrency.solo.TaskPool"


def test_asking_for_the_queues_of_the_task_makes_no_worker_consume_them():
    app = app_of(task_routes={"sdtpu.generate": {"queue": "gpu"}})
    assert device_queues(app)[:2] == ["sdtpu", "sdtpu.t0"]
    assert device_queues(app)[-1] == "gpu"
    assert list(app.amqp.queues.consume_from) == ["celery"]
    assert not is_device_worker(app, has_device_pool=False)


def test_a_router_that_cannot_be_asked_without_a_job_ends_no_worker(caplog):
    def by_user(name: str, args: Any, kwargs: dict[str, Any], *_: Any, **__: Any) -> dict[str, str]:
        return {"queue": f"of-{kwargs['user']}"}

    assert pool_of(app_of(task_routes=[by_user])) == PREFORK
    assert pool_of(app_of(task_routes=[by_user]), "sdtpu") == DEVICES
    assert "the app's routes do not tell the queue" in caplog.text


def test_the_ready_made_app_consumes_jobs_alone_and_sends_next_steps_to_celerys_own_queue(monkeypatch):
    """Its `task_default_queue` was `sdtpu`, so the next task of a chain went to the device workers and failed."""
    monkeypatch.setenv("SDTPU_QUEUE", "art")
    app = importlib.reload(sdtpu_worker.app).app
    try:
        assert list(app.amqp.queues.consume_from) == ["art"]
        assert app.amqp.router.route({}, "shop.publish")["queue"].name == "celery"
        assert app.amqp.router.route({}, "sdtpu.generate")["queue"].name == "art"
        assert is_device_worker(app, has_device_pool=True)
    finally:
        app.close()
