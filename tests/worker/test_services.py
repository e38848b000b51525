"""What a device worker's process has is made and undone by one object, on every path."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from kombu import transport as kombu_transports

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.config import read_config
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.images.store import make_image_store
from sdtpu_worker.operations.health_http import ask_health
from sdtpu_worker.plugin import install
from sdtpu_worker.testing import FakeEngine, FakeJob, FakeSnapshot
from sdtpu_worker.testing.processes import free_port
from sdtpu_worker.worker.pool import make_aggregator
from sdtpu_worker.worker.services import DeviceServices
from tests.support.waiting import wait_until

LANE = (64, 64)


class WarmEngine(FakeEngine):
    """As much of an engine as a worker needs to start."""

    def __init__(self) -> None:
        super().__init__(costs={LANE: TickCosts(2, Cost(0.001))})
        self.traces_since_ready = 0
        self.is_closed = self.weights_were_read = False
        self.info = EngineInfo(
            model="fake", default_sampler="ddim", dtype="int", platform="cpu", device_kind="fake", num_devices=2,
            slots_per_device=1, phases_per_tick=2, resolutions=(LANE,),
        )  # fmt: skip

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Any) -> Any:
        return FakeJob(task_id, request.with_defaults("ddim").num_inference_steps, LANE)

    def pixel_digests(self) -> Any:
        self.weights_were_read = True
        return lambda job: job.task_id

    def check_safety(self, pixels: Any) -> None: ...

    def read_snapshot(self, data: bytes, job: Any) -> FakeSnapshot:
        return FakeSnapshot.from_bytes(data, job.num_steps)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def app(redis_url):
    app = install(Celery("services", broker=redis_url, backend=redis_url, set_as_current=False))
    app.conf.sdtpu_health_address = f"127.0.0.1:{free_port()}"
    yield app
    app.close()


def make_parts(engine: Any) -> Any:
    def make_engine(config: Any, on_phase: Any) -> Any:
        if isinstance(engine, Exception):
            raise engine
        return engine

    return SimpleNamespace(make_engine=make_engine, make_store=make_image_store, make_policy=make_aggregator)


def in_a_thread(look: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(look).result()


def facts_of_the_process(app: Celery) -> dict[str, Any]:
    """Return everything that a device worker may change outside its own object."""
    return {
        "transports": dict(kombu_transports.TRANSPORT_ALIASES),
        "settings": {name: app.conf[name] for name in app.conf},
        "connections": vars(app.amqp).get("Connection"),
        "the result backend of another thread": in_a_thread(lambda: id(app._backend)),
        "log records": logging.getLogRecordFactory(),
        "garbage collection": (gc.get_threshold(), gc.get_freeze_count()),
        "receivers": len(signals.task_internal_error.receivers or ()),
        "threads": {thread.name for thread in threading.enumerate() if thread.name.startswith("sdtpu")},
    }


def test_what_a_start_changes_a_stop_undoes(app):
    before = facts_of_the_process(app)
    engine = WarmEngine()
    services = DeviceServices(app, "a-host", read_config(app.conf))
    assert facts_of_the_process(app) == before, "nothing is changed by making it"
    services.start(make_parts(engine))
    during = facts_of_the_process(app)
    assert all(during[name] != before[name] for name in before), "each of them is really changed"
    services.stop(is_stuck=False)
    services.stop(is_stuck=False)
    wait_until(lambda: facts_of_the_process(app) == before)
    assert engine.is_closed


@pytest.mark.parametrize("error", [ConfigurationError("no such device"), RuntimeError("any other")])
def test_a_start_that_fails_leaves_nothing_behind(app, error):
    before = facts_of_the_process(app)
    services = DeviceServices(app, "a-host", read_config(app.conf))
    with pytest.raises(type(error)):
        services.start(make_parts(error))
    wait_until(lambda: facts_of_the_process(app) == before)


def test_the_threads_of_jobs_share_one_result_backend_and_its_connections(app):
    own = app.backend
    services = DeviceServices(app, "a-host", read_config(app.conf))
    services.start(make_parts(WarmEngine()))
    try:
        shared = in_a_thread(lambda: app.backend)
        assert in_a_thread(lambda: app.tasks["sdtpu.generate"].backend) is shared is app.backend
    finally:
        services.stop(is_stuck=False)
    assert app.backend is own, "what waits for ever in a worker is not left to the process"
    assert in_a_thread(lambda: app.backend) is not shared


def test_reuse_reads_the_weights_at_the_start_and_its_thread_ends_with_the_worker(app, monkeypatch):
    monkeypatch.setenv("SDTPU_REUSE", "on")
    before = facts_of_the_process(app)
    services = DeviceServices(app, "a-host", read_config(app.conf))
    engine = WarmEngine()
    services.start(make_parts(engine))
    assert engine.weights_were_read
    assert services.serving.most_followers == 32
    assert "sdtpu-reuse" in facts_of_the_process(app)["threads"]
    services.stop(is_stuck=False)
    wait_until(lambda: facts_of_the_process(app) == before)


def test_reuse_is_refused_before_anything_is_loaded_where_the_broker_is_not_redis(monkeypatch):
    monkeypatch.setenv("SDTPU_REUSE", "across_tenants")
    app = install(Celery("services", broker="memory://", backend="cache+memory://", set_as_current=False))
    loaded: list[Any] = []
    parts = make_parts(WarmEngine())
    parts.make_engine = loaded.append
    with pytest.raises(ConfigurationError, match=r"sdtpu_reuse must be off .* got across_tenants"):
        DeviceServices(app, "a-host", read_config(app.conf)).start(parts)
    assert loaded == []
    app.close()


def test_a_health_address_that_is_taken_is_found_before_anything_is_loaded(app):
    first = DeviceServices(app, "a-host", read_config(app.conf))
    first.start(make_parts(WarmEngine()))
    try:
        loaded: list[Any] = []
        parts = make_parts(WarmEngine())
        parts.make_engine = loaded.append
        with pytest.raises(ConfigurationError, match="another process listens there"):
            DeviceServices(app, "b-host", read_config(app.conf)).start(parts)
        assert loaded == []
    finally:
        first.stop(is_stuck=False)


def test_both_probes_are_answered_while_the_engine_is_made_and_say_what_it_is_at(app):
    address = read_config(app.conf).health_address
    seen = []

    def make_engine(config: Any, on_phase: Any) -> Any:
        for phase in ("loading the checkpoint", "compiling"):
            on_phase(phase)
            seen.extend(ask_health(address, path) for path in ("/livez", "/readyz"))
        return WarmEngine()

    parts = make_parts(None)
    parts.make_engine = make_engine
    services = DeviceServices(app, "a-host", read_config(app.conf))
    services.start(parts)
    is_ready, checks = ask_health(address, "/readyz")
    services.stop(is_stuck=False)
    assert [well for well, _ in seen] == [True, False, True, False]
    details = [checks[0].detail for _, checks in seen]
    assert all("starting: loading the checkpoint, for" in detail for detail in details[:2]), details
    assert all("starting: compiling, for" in detail for detail in details[2:]), details
    assert (is_ready, checks[0].detail[:26]) == (False, "starting: ready to consume")
