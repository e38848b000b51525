"""One host's engine, device loop and image store: runs a request from its parameters to a stored image."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.config import Config
from sdtpu_worker.contract.load_report import WorkerLoad
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings, describe_loras
from sdtpu_worker.contract.slot_report import SlotReport
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.protocols import Policy, ServableJob, ServingEngine, Snapshot
from sdtpu_worker.device_loop.stages import LoopStage
from sdtpu_worker.device_loop.submission import Finished, Progress, Submission
from sdtpu_worker.device_loop.trace import NoTrace, Trace
from sdtpu_worker.errors import ConfigurationError, SnapshotMismatch
from sdtpu_worker.images.encode import encode_image
from sdtpu_worker.images.open_pictures import PictureOpener
from sdtpu_worker.images.store import ImageStore
from sdtpu_worker.operations.tracing import NoTracing, Tracing
from sdtpu_worker.reuse.stored_image import Drawn
from sdtpu_worker.worker.job_control import JobControl
from sdtpu_worker.worker.job_record import JobRecord
from sdtpu_worker.worker.reuse import NoReuse, Reuse
from sdtpu_worker.worker.reuse_turn import Turn
from sdtpu_worker.worker.slot_view import SlotView

logger = logging.getLogger(__name__)

_STEPS_OF_A_JOB, _LEARNING_RATE = 50, 0.1


@dataclass(frozen=True)
class Hooks:
    """What the process around the engine is told, and asked.

    Attributes:
        on_death: called when the device loop cannot continue.
        on_start: called in the device loop's thread with the jobs that are about to get a slot, and whether no other
            job has one.
        on_tick: called in the device loop's thread with every tick that ended without a failure, and its start and end.
        give_up: asked while an image cannot be stored, or a picture not be read: whether to stop trying.
    """

    on_death: Callable[[], None] = lambda: None
    on_start: Callable[[Sequence[str], bool], None] = lambda task_ids, alone: None
    on_tick: Callable[[Plan, float, float], None] = lambda plan, started_at, ended_at: None
    give_up: Callable[[], bool] = lambda: False


class Serving:
    """A warm engine with its device loop and image store; many threads may call `run` at the same time.

    Args:
        engine: a warm engine.
        store: where images go.
        policy: decides what the devices do; the device loop's from now on.
        config: the settings.
        hooks: what the process around it is told, and asked.
        pictures: opens the pictures that jobs start from; None for a worker whose jobs have none.
        tracing: where the spans of jobs go.
        reuse: finds the images of equal jobs; None to draw every one.

    Raises:
        ConfigurationError: the file of `sdtpu_trace` cannot be written.
    """

    def __init__(
        self,
        engine: ServingEngine,
        store: ImageStore,
        policy: Policy,
        config: Config,
        hooks: Hooks | None = None,
        pictures: PictureOpener | None = None,
        tracing: Tracing | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        hooks = hooks or Hooks()
        self._reuse = reuse or NoReuse()
        self._pictures, self._tracing = pictures or PictureOpener(()), tracing or NoTracing()
        self.engine, self.store, self._progress_s, self._give_up = engine, store, config.progress_s, hooks.give_up
        self._held: dict[Submission, int] = {}  # with the priority of each
        self._mean_job_s: float | None = None
        self._slots, self._on_tick = SlotView(), hooks.on_tick
        self.trace: Trace = NoTrace()
        if config.trace:
            try:
                costs = {lane: costs.cost for lane, costs in engine.costs.items()}
                self.trace = Trace(Path(config.trace), costs, engine.info.num_devices)
            except (OSError, ValueError) as exc:
                raise ConfigurationError(f"sdtpu_trace must be a file that can be written: {exc}") from exc
        self.loop = DeviceLoop(
            engine, policy, hooks.on_death, self.trace, on_start=hooks.on_start, on_tick=self._look_at_tick
        )
        self.loop.start()

    @property
    def num_slots(self) -> int:
        """Slots of one resolution over all devices that are not lost."""
        info = self.engine.info
        return info.num_slots - len(self.loop.stats.lost_devices) * info.slots_per_device

    @property
    def most_followers(self) -> int:
        """Jobs that may wait for equal ones, beyond the capacity."""
        return self._reuse.most_followers

    @property
    def capacity(self) -> int:
        """Jobs to hold at a time: two batches, so that one gathers and is encoded while the other is denoised."""
        return 2 * self.num_slots

    def describe(self) -> str:
        """Return in a line what this host serves, and how fast."""
        info = self.engine.info
        sizes = ", ".join(
            f"{height}x{width} ({1000 * costs.step_s(info.num_devices):.1f} ms a step)"
            for (height, width), costs in self.engine.costs.items()
        )
        return (
            f"{info.num_devices} devices of kind {info.device_kind}, {info.num_slots} slots, {info.dtype}, {sizes},"
            f" sampler {info.default_sampler} by default"
        )

    def run(
        self,
        task_id: str,
        request: GenerationRequest,
        sent_at: float | None = None,
        control: JobControl | None = None,
    ) -> GenerationResult:
        """Generate and store one image; blocks until it is stored.

        Args:
            task_id: names the job and its image.
            request: with a seed.
            sent_at: `time.time()` when the client sent the job, if known; timings count from there.
            control: priority and limits, and who hears of the progress.

        Raises:
            InvalidRequest: this worker cannot serve these parameters.
            GenerationFailed: the devices failed on this job.
            StorageError: the image could not be stored, or a picture not be read.
            JobCancelled, JobOverdue, JobHandedOver: see `DeviceLoop.submit`.
        """
        control = control or JobControl()
        record = control.record or JobRecord.of(task_id, sent_at)
        self._describe(record, request)
        with self._stage("prepare", record):
            job = self.engine.prepare(task_id, request, self._open_pictures(request))
        parameters, options = self._parameters(job, request), request.options()
        text = {**parameters, **options}
        stage = partial(self._stage, record=record)
        with self._reuse.turn(job, request, text, control, record, self._is_draining, stage) as turn:
            drawn = turn.found or self._draw(job, request.image_format, text, control, record)
            image = self._store(job, request.image_format, drawn, turn, record)
        stored_at = record.stored_at = time.monotonic()
        record.reused = drawn.reused
        return GenerationResult(
            task_id=task_id,
            image=image,
            **parameters,
            prompt_truncated=job.truncated,
            nsfw_content_detected=drawn.nsfw,
            timings=Timings(
                queued_s=round(record.queued_s(stored_at), 4),
                device_s=round(record.device_s(stored_at), 4),
                total_s=round(record.total_s(stored_at), 4),
            ),
            batch=drawn.batch,
            options=options,
            loras=describe_loras([*self.engine.info.loras, *request.loras]),
            reused=drawn.reused,
        )

    @contextlib.contextmanager
    def _stage(self, name: str, record: JobRecord) -> Iterator[None]:
        """Measure and draw what the calling thread does for a job in this block."""
        with self.trace.span(name, record.task_id), record.stage(name), self._tracing.stage(name):
            yield

    def _describe(self, record: JobRecord, request: GenerationRequest) -> None:
        """Say on the task's span what the job is, by OpenTelemetry's conventions for messaging and generative AI."""
        attributes = {
            "messaging.system": "celery",
            "messaging.operation.type": "process",
            "messaging.message.id": record.task_id,
            "messaging.destination.name": record.queue or None,
            "gen_ai.operation.name": "generate_content",
            "gen_ai.provider.name": "sdtpu_worker",
            "gen_ai.output.type": "image",
            "gen_ai.request.model": self.engine.info.model,
            "gen_ai.request.seed": request.seed,
            "sdtpu.num_inference_steps": request.num_inference_steps,
            "sdtpu.sampler": request.sampler,
            "sdtpu.waited_before_s": record.waited_before_s,
        }
        self._tracing.describe(attributes, request.prompt, request.negative_prompt)

    def _open_pictures(self, request: GenerationRequest) -> Mapping[str, Any]:
        """Return the request's pictures as arrays."""
        opened = self._pictures.open(request)
        if not opened:
            return {}
        import numpy as np

        return {
            name: [np.asarray(each) for each in picture] if isinstance(picture, list) else np.asarray(picture)
            for name, picture in opened.items()
        }

    def _denoise(self, job: ServableJob, control: JobControl, record: JobRecord) -> Finished:
        """Have the device loop run a prepared job, and wait for its pixels."""
        snapshot = self._read_snapshot(job, control.snapshot)
        self._tracing.follow(record.task_id)
        submission = self.loop.submit(job, control.terms, control.may_start, snapshot, control.alone)
        record.submission = submission
        self._held[submission] = control.terms.priority
        error: BaseException | None = None
        try:
            finished = record.finished = self._wait(submission, control.publish)
        except BaseException as exc:
            error = exc
            raise
        finally:
            del self._held[submission]
            record.num_slots = self.num_slots
            self._tracing.finish(record.task_id, record.way(error))
        self._learn(finished.finished_at - finished.started_at)
        return finished

    def _parameters(self, job: ServableJob, request: GenerationRequest) -> dict[str, Any]:
        """Return what an image is made with, as a PNG of it and its result say."""
        words = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": request.seed}
        return {**words, **job.parameters, "model": self.engine.info.model}

    def _draw(
        self, job: ServableJob, image_format: str, text: Mapping[str, Any], control: JobControl, record: JobRecord
    ) -> Drawn:
        """Have the devices draw a job's image; check and encode it. An unsafe one is black.

        Args:
            job: as the engine prepared it.
            image_format: png, jpeg or webp.
            text: the parameters that a PNG says.
            control: priority and limits, and who hears of the progress.
            record: of the job.
        """
        finished = self._denoise(job, control, record)
        pixels = job.finish(finished.pixels)
        with self._stage("check safety", record):
            is_unsafe = self.engine.check_safety(pixels)
        if is_unsafe:
            pixels = pixels * 0
        with self._stage("encode", record):
            data = encode_image(pixels, image_format, text)
        place = BatchPlace(finished.device, finished.slot, finished.occupied, record.num_slots)
        return Drawn(data, is_unsafe, place)

    def _store(self, job: ServableJob, image_format: str, drawn: Drawn, turn: Turn, record: JobRecord) -> StoredImage:
        """Store an image under its job's own id, and have equal jobs find it."""
        with self._stage("store", record):
            began_at = time.monotonic()
            uri = self.store.put(job.task_id, image_format, drawn.data, self._give_up)
        turn.keep(drawn, began_at)
        height, width = job.lane
        return StoredImage(uri, image_format, width, height, len(drawn.data))

    def _is_draining(self) -> bool:
        """Return whether the loop has ceased to take what waits."""
        return self.loop.stage is not LoopStage.RUNNING

    def counts(self) -> tuple[int, int]:
        """Return how many jobs have a slot, and how many wait in the device loop for one. Any thread."""
        held = self._held.copy()
        running = sum(submission.has_slot for submission in held)
        return running, len(held) - running

    def load(self, host: str) -> WorkerLoad:
        """Return the load report of this worker, under the name that its host has for it. Any thread."""
        held, num_slots = self._held.copy(), self.num_slots
        etas = [submission.progress.eta_s for submission in held]
        lanes = {f"{height}x{width}": costs for (height, width), costs in self.engine.costs.items()}
        num_devices = num_slots // self.engine.info.slots_per_device
        steps_s = {size: costs.step_s(num_devices) for size, costs in lanes.items()}
        return WorkerLoad(
            host=host,
            num_slots=num_slots,
            step_s=steps_s,
            mean_job_s=self._mean_job_s or _STEPS_OF_A_JOB * next(iter(steps_s.values())),
            held=dict(Counter(held.values())),
            default_steps=self.engine.info.default_steps,
            serves=self.engine.info.serves,
            next_free_s=0.0 if len(held) < num_slots else min((eta for eta in etas if eta), default=0.0),
        )

    def slots(self) -> SlotReport:
        """Return which jobs are in which slots. Any thread."""
        return self._slots.report(self.engine.info, self.loop.stats.lost_devices, self._held.copy())

    def _look_at_tick(self, plan: Plan, started_at: float, ended_at: float) -> None:
        self._slots.on_tick(plan)
        self._on_tick(plan, started_at, ended_at)

    def _learn(self, job_s: float) -> None:
        mean_s = self._mean_job_s
        self._mean_job_s = max(1e-3, job_s if mean_s is None else mean_s + _LEARNING_RATE * (job_s - mean_s))

    def _read_snapshot(self, job: ServableJob, data: bytes | None) -> Snapshot | None:
        if data is None:
            return None
        try:
            return self.engine.read_snapshot(data, job)
        except SnapshotMismatch as exc:
            logger.warning("task %s starts anew: %s", job.task_id, exc)
            return None

    def _wait(self, submission: Submission, publish: Callable[[Progress], None] | None) -> Finished:
        """Wait for the pixels; publish the job's progress when it gets its slot, and every `sdtpu_progress_s`."""
        published, next_at = submission.progress, time.monotonic() + self._progress_s
        while publish and self._progress_s:
            submission.moved.wait(max(0.0, next_at - time.monotonic()))
            submission.moved.clear()
            if submission.future.done():
                break
            now, progress = time.monotonic(), submission.progress
            got_its_slot = published.pending and not progress.pending
            if now >= next_at or got_its_slot:
                next_at = now + self._progress_s
                if progress is not published:
                    published = progress
                    publish(progress)
        return submission.future.result()

    def close(self) -> None:
        """Stop the device loop."""
        self.loop.close()
