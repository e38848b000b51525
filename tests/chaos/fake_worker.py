"""A Celery app whose worker is real in everything but its devices: `celery -A tests.chaos.fake_worker worker`.

Its engine counts (see `FakeEngine`) and makes pictures of the counts, so that a picture shows whether its job took
each of its steps once. Some prompts are accidents:

    "raise"   the device program raises while the job has a slot
    "nan"     the picture is none
    "kill"    the process dies when the job gets its slot
    "hang"    the tick in which the job gets its slot does not end
    "lose"    the devices are lost when the job gets its slot

`SDTPU_FAKE_STEP_MS` (default 1) is the time of a step, `SDTPU_CPU_DEVICES` the number of devices,
`SDTPU_FAKE_PUT_BUDGET_S` for how long an image is tried to be stored, `SDTPU_FAKE_CONF` more of Celery's settings, in
JSON; `SDTPU_FAKE_ACCIDENTS=off` makes a worker on which no prompt is an accident.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.app import app
from sdtpu_worker.config import Config
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.device_loop.protocols import ServingEngine
from sdtpu_worker.images.store import ImageStore, make_image_store
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeImage, FakeJob, FakeSnapshot, FakeTick
from sdtpu_worker.worker.pool import DevicePool
from tests.chaos.pictures import LANE, count_brought, expected_count, picture

__all__ = ["app"]


@dataclasses.dataclass(frozen=True)
class PictureJob(FakeJob):
    """A job of the fake engine, with what a worker reads of it."""

    prompt: str = ""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    truncated: bool = False


class PictureEngine(FakeEngine):
    """A `FakeEngine` that a whole worker can run on."""

    def __init__(self, devices: int, slots_per_device: int, step_s: float) -> None:
        super().__init__(costs={LANE: TickCosts(devices, Cost(step_s))})
        self.traces_since_ready = 0
        self.info = EngineInfo(
            model="fake",
            default_sampler="ddim",
            dtype="int",
            platform="cpu",
            device_kind="fake",
            num_devices=devices,
            slots_per_device=slots_per_device,
            phases_per_tick=slots_per_device + 1,
            resolutions=(LANE,),
        )

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Mapping[str, Any]) -> PictureJob:
        """Make a job that counts from its seed on, and from what its pictures and LoRAs stand for."""
        count = expected_count(request.seed or 0, 0, count_brought(pictures, request.loras))
        request = request.with_defaults("ddim")
        prompt = request.prompt if os.environ.get("SDTPU_FAKE_ACCIDENTS") != "off" else ""
        if prompt in ("raise", "nan"):
            accident = "poison" if prompt == "raise" else "nan"
            setattr(self, accident, getattr(self, accident) | {task_id})
        return PictureJob(task_id, request.num_inference_steps, LANE, count, prompt, request.parameters())

    def check_safety(self, pixels: np.ndarray) -> None:
        """Have no safety checker."""

    def close(self) -> None:
        """Do nothing: nothing is registered."""

    def pixel_digests(self) -> Callable[[PictureJob], str]:
        """Tell jobs apart by what they count."""
        return lambda job: f"{job.value} {job.num_steps}"

    def read_snapshot(self, data: bytes, job: FakeJob) -> FakeSnapshot:
        """Rebuild what `to_bytes` gave."""
        return FakeSnapshot.from_bytes(data, job.num_steps)

    def draw(self, count: int) -> np.ndarray:
        """Return a picture of a count."""
        return picture(count)

    def execute(
        self, plan: Plan, jobs: Mapping[str, Any], snapshots: Mapping[str, FakeSnapshot] | None = None
    ) -> FakeTick:
        """Follow a plan; accidents happen."""
        prompts = {jobs[task_id].prompt for task_id in plan.inserted()}
        if "kill" in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "lose" in prompts:
            self.fatal_at = (self.calls,)
        tick = super().execute(plan, jobs, snapshots)
        self.ticks.clear()
        return HangingTick([], tick.parked, None, 0.0) if "hang" in prompts else tick


class HangingTick(FakeTick):
    """A tick that does not end."""

    def wait(self) -> list[FakeImage]:
        """Block for ever."""
        threading.Event().wait()
        return []


if TYPE_CHECKING:
    _: type[ServingEngine] = PictureEngine  # mypy reports here what the double lacks of the contract


class FakeDevicePool(DevicePool):
    """The device worker's pool, on the fake engine."""

    @staticmethod
    def make_engine(config: Config, on_phase: Callable[[str], None]) -> PictureEngine:
        """Make the engine at once: there is nothing to compile."""
        step_s = float(os.environ.get("SDTPU_FAKE_STEP_MS", "1")) / 1000
        return PictureEngine(config.cpu_devices, int(config.slots_per_device), step_s)

    @staticmethod
    def make_store(app: Any, url: str) -> ImageStore:
        """Make the store, with the patience that the test asks for."""
        store = make_image_store(app, url)
        if budget_s := os.environ.get("SDTPU_FAKE_PUT_BUDGET_S"):
            store.budget_s = float(budget_s)  # type: ignore[attr-defined]  # both stores have it
        return store


app.conf.update(json.loads(os.environ.get("SDTPU_FAKE_CONF", "{}")))
app.conf.worker_pool = "tests.chaos.fake_worker:FakeDevicePool"
