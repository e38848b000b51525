"""A device worker's pool inside the test's own process: real jobs, real requests and a real Celery app, but no Redis.

The broker is this module: it makes the messages and notes what becomes of them. The devices count (see `FakeEngine`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from celery.utils.functional import noop
from celery.worker import state
from celery.worker.request import create_request_cls
from kombu.message import Message

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.config import read_config
from sdtpu_worker.contract.queues import TASK_NAME
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.delivery.transport import ClaimingChannel
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.operations.figures import Figures
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob, FakeSnapshot, FakeTick
from sdtpu_worker.worker.celery_request import DeviceRequest
from sdtpu_worker.worker.pool import DevicePool, make_aggregator
from sdtpu_worker.worker.process_changes import watch_failures_outside_tasks
from sdtpu_worker.worker.result_patience import wait_for_results
from sdtpu_worker.worker.serving import Hooks, Serving
from sdtpu_worker.worker.tick_meter import TickMeter
from tests.support.clients import client_app
from tests.support.waiting import wait_until

LANE = (8, 8)


@dataclass(frozen=True)
class CountingJob(FakeJob):
    """A job of the fake engine, with what a worker reads of it."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False


class CountingEngine(FakeEngine):
    """A `FakeEngine` with two slots that a pool can run on.

    Attributes:
        inserted: the jobs that started here from their first step.
    """

    traces_since_ready = 0
    info = EngineInfo("fake", "ddim", "int", "cpu", "fake", num_devices=2, slots_per_device=1, phases_per_tick=2,
                      resolutions=(LANE,))  # fmt: skip

    def __init__(self, step_s: float) -> None:
        super().__init__(costs={LANE: TickCosts(2, Cost(step_s))})
        self.inserted: set[str] = set()

    def execute(self, plan: Plan, *args: Any) -> FakeTick:
        self.inserted.update(plan.inserted())
        return super().execute(plan, *args)

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Any) -> CountingJob:
        request = request.with_defaults("ddim")
        return CountingJob(task_id, request.num_inference_steps, LANE, parameters=request.parameters())

    def check_safety(self, pixels: np.ndarray) -> None:
        """Have no safety checker."""

    def read_snapshot(self, data: bytes, job: FakeJob) -> FakeSnapshot:
        return FakeSnapshot.from_bytes(data, job.num_steps)

    def draw(self, count: int) -> np.ndarray:
        return np.full((*LANE, 3), count & 255, np.uint8)


class Images:
    """An image store in memory; while `error` is set it raises that."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def put(self, task_id: str, image_format: str, data: bytes, give_up: Any = None) -> str:
        if self.error is not None:
            raise self.error
        self.data[task_id] = data
        return f"memory:{task_id}"


class Broker:
    """What Redis keeps of the jobs of all workers.

    Attributes:
        told: what became of each message, by task id: "done", "requeued" or "left" to its lease.
        snapshots, died_on: what earlier workers left of a job.
        error: raised when a worker asks for that.
    """

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.snapshots: dict[str, bytes] = {}
        self.died_on: dict[str, list[str]] = {}
        self.suspects: set[str] = set()
        self.error: Exception | None = None

    def job_facts(self, task_id: str) -> JobFacts:
        if self.error is not None:
            raise self.error
        return JobFacts(self.died_on.get(task_id, []), self.snapshots.get(task_id))

    def save_snapshot(self, task_id: str, data: bytes) -> None:
        self.snapshots[task_id] = data

    def is_lost(self, tag: str) -> bool:
        return False

    def mark_suspect(self, tag: str) -> None:
        self.suspects.add(tag)

    def mark_running(self, tag: str) -> None:
        """Do nothing."""

    def release(self, tag: str) -> None:
        self.told.setdefault(tag, "left")


class BrokersChannel(ClaimingChannel):
    """The channel that the messages say they came on."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.no_ack_consumers = broker, None

    def basic_ack(self, tag: str, multiple: bool = False) -> None:
        self.broker.told[tag] = "done"

    def basic_reject(self, tag: str, requeue: bool = False) -> None:
        self.broker.told[tag] = "requeued" if requeue else "rejected"


class Events:
    """Collects the events that a worker with `-E` sends."""

    enabled = True

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send(self, type: str, uuid: str, **fields: Any) -> None:
        self.sent.append((uuid, type))

    def of(self, task_id: str) -> list[str]:
        """Return the types of a task's events."""
        return [kind for uuid, kind in self.sent.copy() if uuid == task_id]


class InProcessWorker:
    """A pool that serves, and the main thread of its worker. Make it with `in_process_worker`."""

    def __init__(self, app: Any, broker: Broker, step_s: float, **hooks: Any) -> None:
        self.app, self.broker, self.events = app, broker, Events()
        self.engine, self.images = CountingEngine(step_s), Images()
        self.stopping, self.figures = threading.Event(), Figures()
        config = read_config(app.conf)
        serving = Serving(
            self.engine, self.images, make_aggregator(self.engine, config), config,  # type: ignore[arg-type]  # double
            Hooks(
                on_tick=TickMeter(self.figures, self.engine.costs, self.engine.info.num_slots),
                give_up=self.stopping.is_set,
            ),
        )  # fmt: skip
        services: Any = SimpleNamespace(
            serving=serving, deliveries=broker, observation=SimpleNamespace(figures=self.figures),
            config=config,
            health=SimpleNamespace(drain=lambda: None),
            stopping=self.stopping, wait_for_results=lambda: wait_for_results(app.backend, self.stopping.is_set),
        )  # fmt: skip
        self.pool = DevicePool(2, app=app)
        self.pool.serve(services)
        self.request_class = create_request_cls(
            DeviceRequest, app.tasks[TASK_NAME], self.pool, "worker@test", self.events, app=app
        )

    def take(self, task_id: str = "", redelivered: bool = False, steps: int = 4, **options: Any) -> DeviceRequest:
        """Do what the main thread does with a message; return Celery's request."""
        task_id = task_id or uuid.uuid4().hex
        self.broker.told.pop(task_id, None)
        kwargs = {"seed": 1, "num_inference_steps": steps}
        made = self.app.amqp.as_task_v2(task_id, TASK_NAME, ("a fox",), kwargs, **options)
        message = Message(
            body=json.dumps(made.body), headers=made.headers, properties={**made.properties, "priority": 6},
            content_type="application/json", content_encoding="utf-8", delivery_tag=task_id,
            delivery_info={"redelivered": redelivered}, channel=BrokersChannel(self.broker),
        )  # fmt: skip
        request = self.request_class(message, app=self.app, task=self.app.tasks[TASK_NAME], eventer=self.events,
                                     on_ack=noop, on_reject=noop, hostname="worker@test")  # fmt: skip
        if not ((request.expires or task_id in state.revoked) and request.revoked()):
            state.task_reserved(request)
            request.execute_using_pool(self.pool)
        return request

    def wait_for_end(self, request: DeviceRequest) -> str:
        """Wait until a job has left this worker; return what became of its message."""
        results = self.pool._results
        wait_until(lambda: all(job.request is not request for job in results.copy()), "the job's thread to end")
        return self.broker.told[request.id]

    def wait_for_slot(self, request: DeviceRequest) -> None:
        """Wait until a job's first steps are done."""
        loop = self.pool.services.serving.loop
        wait_until(lambda: (job := loop._jobs._jobs.get(request.id)) and job.steps_done, lambda: "no slot")

    def meta(self, request: DeviceRequest) -> dict[str, Any]:
        """Return what the result backend has of a job."""
        return self.app.backend.get_task_meta(request.id, cache=False)


@contextlib.contextmanager
def backend_app(backend: str, **conf: Any) -> Iterator[Any]:
    """Make an app without a broker the current one and every thread's, with a result backend of this URL."""
    with client_app("memory://", backend, **conf) as app:
        app.loader.import_default_modules()
        app.finalize()
        yield app


@contextlib.contextmanager
def in_process_worker(app: Any, broker: Broker | None = None, step_s: float = 0.002) -> Iterator[InProcessWorker]:
    """Run a pool; at the end its jobs are handed over, unless it has stopped."""
    worker = InProcessWorker(app, broker or Broker(), step_s)
    try:
        with watch_failures_outside_tasks():
            yield worker
            worker.stopping.set()
            worker.pool.terminate()
    finally:
        worker.stopping.set()
        worker.pool.services.serving.close()
        state.reset_state()
