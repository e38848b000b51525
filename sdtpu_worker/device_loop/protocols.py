"""The contracts between the device loop, the worker, the engine and the policy. None of them names Celery or JAX.

A `Policy` decides, a `DeviceEngine` executes what it decided, and the `DeviceLoop` between them owns the time. The
worker around the loop needs more of an engine than the loop does: that is a `ServingEngine`. Another engine, or a
double for tests, must offer what stands here and nothing else.

An engine gets back the jobs and snapshots that it made itself; only it can read them. So parameters that take them
are typed `Any`, and what an engine returns is typed by what the loop and the worker read of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.jobs import Eligibility, Load, Overdue, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.engine_info import EngineInfo

if TYPE_CHECKING:
    import numpy as np


class Job(Protocol):
    """What the loop reads of a prepared job."""

    @property
    def task_id(self) -> str:
        """Names the job in plans."""

    @property
    def lane(self) -> Lane:
        """The job's resolution, `(height, width)` in pixels."""

    @property
    def num_steps(self) -> int:
        """Denoising steps from the start to the image, each one evaluation of the model."""

    @property
    def load(self) -> Load:
        """What the job asks of its device beyond words and steps."""


class ServableJob(Job, Protocol):
    """What the worker reads of a prepared job besides."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the image is made with besides prompts and seed: `num_inference_steps`, `guidance_scale`, `sampler`."""

    @property
    def truncated(self) -> bool:
        """Whether a prompt was longer than the text encoder takes."""

    def finish(self, pixels: Any) -> Any:
        """Return the picture of what the devices decoded: with the pixels that the job's mask leaves alone."""


class Snapshot(Protocol):
    """A job's whole state off the devices, or on its way from there. Any thread may use it."""

    @property
    def step(self) -> int:
        """Denoising steps that the job has taken; waits for the copy from the device.

        Raises:
            Exception: the copy failed with its device.
        """

    @property
    def finite(self) -> bool:
        """Whether the state has no NaN and no infinity; waits for the copy from the device.

        Raises:
            Exception: the copy failed with its device.
        """

    def to_bytes(self) -> bytes:
        """Return the snapshot for another worker, which reads it with `ServingEngine.read_snapshot`."""


class Image(Protocol):
    """One decoded image."""

    @property
    def task_id(self) -> str:
        """The job that the image belongs to."""

    @property
    def device(self) -> int:
        """The device that decoded it."""

    @property
    def slot(self) -> int:
        """The slot of the device that held the job."""

    @property
    def pixels(self) -> Any:
        """`(height, width, 3) uint8`; an engine for tests may give whatever its tests compare."""

    @property
    def finite(self) -> bool:
        """Whether the latents and the pixels had no NaN and no infinity; if not, the pixels are no image."""


class ExecutedTick(Protocol):
    """A dispatched plan. Ticks end in the order in which they were dispatched."""

    @property
    def parked(self) -> Mapping[str, Snapshot]:
        """By task id, the snapshots of `Plan.parked`: on the host after `wait`, on their way there before."""

    @property
    def previews(self) -> Mapping[str, np.ndarray]:
        """By task id, `(h, w, 3) uint8`, the small images of `Plan.previews`; filled by `wait`."""

    @property
    def done_at(self) -> float | None:
        """`time.monotonic()` when the devices were done, if that is known; set by `wait`."""

    def wait(self) -> Sequence[Image]:
        """Block until the devices are done, and return the images that the tick decoded.

        Called once, in the thread `sdtpu-device-wait`.

        Raises:
            Exception: what the device program raised; the slots of all devices are lost then.
        """


class DeviceEngine(Protocol):
    """What the device loop uses of an engine. The engine never chooses: a plan says what every device does.

    The loop calls `execute`, `is_fatal`, `recover` and `check_devices` in its own thread, `accepts` in any.
    """

    @property
    def lost_devices(self) -> Collection[int]:
        """Devices that did not draw the reference image at the start as the others did."""

    def execute(self, plan: Plan, jobs: Mapping[str, Any], snapshots: Mapping[str, Any]) -> ExecutedTick:
        """Dispatch a plan without waiting for the devices.

        Args:
            plan: what every device does, in this order: park, resume, the phases, previews.
            jobs: by task id, the prepared jobs that the plan inserts, as `ServingEngine.prepare` made them.
            snapshots: by task id, the snapshots of the jobs that the plan resumes, as this engine made or read them.

        Raises:
            Exception: nothing was dispatched, or what was dispatched is lost; the loop calls `recover` when the ticks
                before have ended.
        """

    def accepts(self, snapshot: Any) -> bool:
        """Return whether a job can resume from a snapshot here, bit for bit."""

    def is_fatal(self, exc: Exception) -> bool:
        """Return whether no other try on these devices can mend what `execute` or `wait` raised."""

    def recover(self, lost: Collection[int] = ()) -> Collection[int]:
        """Empty every slot after a failure, and return what `check_devices` returns.

        Args:
            lost: devices that are lost already; they are not asked.

        Raises:
            Exception: no device works; the loop gives up.
        """

    def check_devices(self, lost: Collection[int] = ()) -> Collection[int]:
        """Have the devices draw the reference image; return those that do not draw it as at the start.

        No job is in a slot, no tick is in flight.

        Args:
            lost: devices that are lost already; they are not asked.

        Raises:
            Exception: no device works; the loop gives up.
        """


class ServingEngine(DeviceEngine, Protocol):
    """What a worker uses of an engine besides: preparing jobs, reading snapshots, checking images, facts.

    Every method may be called from any thread, except those of `DeviceEngine` and `close`.
    """

    @property
    def info(self) -> EngineInfo:
        """The facts that do not change."""

    @property
    def costs(self) -> Mapping[Lane, TickCosts]:
        """What work costs, by lane; the policy corrects these very objects with every tick."""

    @property
    def traces_since_ready(self) -> int:
        """Programs that this process traced or compiled since the engine was ready; 0 while all is well."""

    def prepare(self, task_id: str, request: GenerationRequest, pictures: Mapping[str, Any]) -> ServableJob:
        """Do the host's part of a job.

        Args:
            task_id: names the job in plans.
            request: with a seed.
            pictures: the request's, by parameter: `image`, `(height, width, 3) uint8`, and `mask_image`,
                `(height, width) bool`.

        Raises:
            InvalidRequest: this engine does not serve the request.
        """

    def pixel_digests(self) -> Callable[[Any], str]:
        """Return what gives a digest of everything that decides a prepared job's pixels; may take some seconds.

        Jobs with equal ones have equal pixels, bit for bit, on every engine that gives them.
        """

    def read_snapshot(self, data: bytes, job: Any) -> Snapshot:
        """Read what another worker's `Snapshot.to_bytes` wrote; the bytes may come from anybody.

        Args:
            data: the bytes.
            job: the job that the snapshot must be of, as `prepare` made it.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot of this job, which this engine can resume from.
        """

    def check_safety(self, pixels: Any) -> bool | None:
        """Return whether the checkpoint's safety checker flags an image; None if the checkpoint has none.

        Args:
            pixels: `Image.pixels` as the engine gave them.
        """

    def memory(self) -> Mapping[int, Mapping[str, int]]:
        """Return how many bytes of memory each device has `used` now and at its `peak`, and its `limit`.

        Kinds that a device does not tell are left out; a CPU tells none.
        """

    def close(self) -> None:
        """Undo what the engine registered in this process. Called once, when no tick is in flight."""


class Policy(Protocol):
    """What the device loop uses of a policy; see `sdtpu_worker.aggregator.policy.Aggregator`.

    Only the loop's thread calls it. Times are in seconds on the loop's clock.
    """

    @property
    def num_devices(self) -> int:
        """Devices that every plan has phases for."""

    def add(
        self,
        task_id: str,
        lane: Lane,
        num_steps: int,
        now: float,
        terms: Terms | None,
        steps_done: int = 0,
        load: Load = ...,
    ) -> None:
        """Queue a job; a job with `steps_done` resumes from a snapshot.

        Raises:
            KeyError: the lane has no programs.
            ValueError: the policy has this task already.
        """

    def cancel(self, task_id: str) -> bool:
        """Drop a job, and free its slot; return False if the policy does not have the job."""

    def overdue(self, now: float) -> list[tuple[str, Overdue]]:
        """Drop and return the jobs whose time is over."""

    def plan(self, now: float, most_s: float = math.inf) -> Plan | None:
        """Return the next tick, of at most `most_s` seconds if possible, or None when there is nothing to do in it."""

    def set_eligible(self, eligibility: Eligibility) -> None:
        """Give slots only to eligible jobs from now on, and park the running jobs that are not eligible."""

    def exclude(self, device: int) -> Sequence[str]:
        """Give a device nothing to do any more; drop and return the jobs that had a slot there.

        Raises:
            ValueError: there would be no device left.
        """

    def places(self) -> Mapping[Lane, Sequence[Place]]:
        """Return where every running job is, by lane."""

    def expected_s(self, plan: Plan) -> float:
        """Return the seconds that a plan is expected to take."""

    def update(self, outcome: Outcome) -> None:
        """Learn how long a plan took."""

    def etas_s(self, now: float) -> Mapping[str, float]:
        """Return by task id the seconds until a job's image is expected."""

    def lowest_priority_running(self) -> int | None:
        """Return the largest priority number of the jobs that could lose their slot; None if there are none."""

    def counts(self) -> Mapping[str, int]:
        """Return how many jobs are `waiting` and how many are `running`."""
