"""Slots on the devices: prepares jobs on the host, executes plans, hands decoded pixels back.

The engine never chooses: a plan says for each device which slot to decode, which job to insert, how many steps to
take, and whose state leaves or comes back. It never touches Celery.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Lane, Place, Plan
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion import calibration as warmup
from sdtpu_worker.diffusion.cache import CompileCache, TraceCounter
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.engine_io import DecodedImage, PreparedJob, Tick, by_device
from sdtpu_worker.diffusion.programs import (
    NOTHING,
    Geometry,
    SlotState,
    lower_preview,
    lower_restore,
    lower_safety_check,
    lower_snapshot,
    lower_tick,
    tick_params,
)
from sdtpu_worker.diffusion.samplers import make_table
from sdtpu_worker.diffusion.sharding import REPLICATED, SHARDED, make_mesh, put
from sdtpu_worker.diffusion.snapshot import JobSnapshot, fingerprint_of, layout_of
from sdtpu_worker.errors import ConfigurationError, EngineUnavailable, InvalidCheckpoint, InvalidRequest

_SAFETY, _SNAPSHOT, _RESTORE, _PREVIEW = "safety check", "snapshot", "restore", "preview"

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
"""What XLA says when buffers or programs do not fit. Source: openxla/xla docs/errors, E0100 and E0101."""
_LOST = (
    "halted",  # a TPU core stopped: "Core halted unexpectedly", "device halted prematurely" (docs/errors, E0200)
    "UNAVAILABLE:", "ABORTED:", "DATA_LOSS:",  # absl's codes of a connection, a runtime or a memory that is gone
    "DEVICE_LOST", "device is lost", "CUDA_ERROR_", "hipError",  # errors that stay with a GPU's context
)  # fmt: skip


class Engine:
    """A checkpoint replicated over devices, with compiled programs and slots for each resolution.

    `prepare` may be called from any thread; `execute` from one thread at a time.

    Args:
        checkpoint: the loaded model.
        devices: which to use.
        slots_per_device: rows of each device's batch; fixed for good, since pixels are bitwise equal only within
            one compiled configuration.
        resolutions: `(height, width)` pairs in pixels; default: the checkpoint's own.
        compile_cache: the persistent one, for its counts.
        with_previews: make plans with previews possible.

    Raises:
        ConfigurationError: a resolution does not fit the model.
        InvalidCheckpoint: the parameters do not fit the configs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        devices: list[jax.Device],
        slots_per_device: int = 1,
        resolutions: tuple[tuple[int, int], ...] | None = None,
        compile_cache: CompileCache | None = None,
        with_previews: bool = False,
    ) -> None:
        self.checkpoint, self.slots_per_device = checkpoint, slots_per_device
        self.num_devices, self.device_kind = len(devices), devices[0].device_kind
        self.platform = devices[0].platform
        self.resolutions = tuple(dict.fromkeys(resolutions or (checkpoint.default_size,)))
        self.mesh = make_mesh(devices)
        self.costs: dict[Lane, TickCosts] = {}
        self._colours: dict[Lane, jax.Array] = {}
        self._proofs: dict[Lane, np.ndarray] = {}
        multiple = checkpoint.vae_scale_factor * 2 ** (len(checkpoint.unet.config.block_out_channels) - 1)
        for size in self.resolutions:
            if any(side % multiple for side in size):
                raise ConfigurationError(
                    f"sdtpu_resolutions must be multiples of {multiple} pixels for this checkpoint, got {_size(size)}"
                )
        self._geometries = {
            size: Geometry.of(checkpoint, self.num_devices, slots_per_device, *size) for size in self.resolutions
        }
        self._layouts = {size: layout_of(geometry) for size, geometry in self._geometries.items()}
        self.phases_per_tick = self._geometries[self.resolutions[0]].phases
        self.fingerprints = {
            size: fingerprint_of(checkpoint, size, slots_per_device, self.device_kind) for size in self.resolutions
        }
        self.params = params = put(tick_params(checkpoint.params), self.mesh, REPLICATED)
        self._safety_params: Any = None
        started = time.monotonic()
        try:
            programs: dict[Any, Any] = {}
            for size, geometry in self._geometries.items():
                programs[size] = lower_tick(checkpoint, params, geometry, self.mesh)
                programs[_SNAPSHOT, size] = lower_snapshot(geometry, self.mesh)
                programs[_RESTORE, size] = lower_restore(geometry, self.mesh)
                if with_previews:
                    programs[_PREVIEW, size] = lower_preview(geometry, self.mesh)
        except (FlaxError, TypeError, ValueError) as exc:
            raise InvalidCheckpoint(
                f"{checkpoint.name}: the parameters do not fit the configs: {_first_line(exc)}"
            ) from exc
        if checkpoint.safety_checker is not None:
            self._safety_params = put(checkpoint.params["safety_checker"], self.mesh, REPLICATED)
            programs[_SAFETY] = lower_safety_check(checkpoint, self._safety_params, self.mesh)
        traced = time.monotonic()
        counts = compile_cache.counts() if compile_cache else (0, 0)
        with ThreadPoolExecutor(len(programs)) as threads:
            compiled = dict(zip(programs, threads.map(lambda p: p.compile(), programs.values()), strict=True))
        self.trace_s, self.compile_s = traced - started, time.monotonic() - traced
        self.cache_hits, self.cache_misses = compile_cache.since(counts) if compile_cache else (0, 0)
        self._safety_check = compiled.pop(_SAFETY, None)
        self._safety_lock = threading.Lock()
        self._programs = compiled
        self.reset()
        self._warm_up()
        self._traces = TraceCounter()

    @property
    def traces_since_ready(self) -> int:
        """How many programs this process traced or compiled since the engine was ready; none, unless others do."""
        return self._traces.count()

    @property
    def num_slots(self) -> int:
        """Slots of one resolution over all devices."""
        return self.num_devices * self.slots_per_device

    def prepare(self, task_id: str, request: GenerationRequest, key_data: np.ndarray | None = None) -> PreparedJob:
        """Do the host's part of a job: tokenise, make the coefficient table, make the key.

        Args:
            task_id: names the job in plans.
            request: with a seed, unless `key_data` is given.
            key_data: `(2,) uint32`, raw key words (for split keys), instead of the request's seed.

        Raises:
            InvalidRequest: the size or the sampler is not served here.
        """
        height, width = self.checkpoint.default_size
        size = (request.height or height, request.width or width)
        if size not in self._geometries:
            raise InvalidRequest(
                f"height x width must be one of {', '.join(map(_size, self.resolutions))} (sdtpu_resolutions),"
                f" got {_size(size)}"
            )
        sampler = request.sampler or self.checkpoint.default_sampler
        table = make_table(sampler, self.checkpoint.schedule, request.num_inference_steps)
        if key_data is None:
            if request.seed is None:
                raise InvalidRequest("seed is missing: pass one, or the key's words")
            key_data = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
        prompt_ids, truncated = self.tokenise([request.negative_prompt, request.prompt])
        return PreparedJob(
            task_id=task_id,
            lane=size,
            sampler=sampler,
            prompt_ids=prompt_ids,
            key_data=np.asarray(key_data, np.uint32),
            num_inference_steps=table.num_inference_steps,
            guidance_scale=request.guidance_scale,
            init_noise_sigma=table.init_noise_sigma,
            table=table.rows,
            truncated=truncated,
        )

    def tokenise(self, prompts: list[str]) -> tuple[np.ndarray, bool]:
        """Return token ids, `(len(prompts), 77) int32`, and whether any prompt had to be cut."""
        return self.checkpoint.tokenizer.encode(prompts)

    def execute(
        self, plan: Plan, jobs: Mapping[str, PreparedJob], snapshots: Mapping[str, JobSnapshot] | None = None
    ) -> Tick:
        """Dispatch a plan and return without waiting for the devices.

        Args:
            plan: what to do.
            jobs: the prepared jobs that the plan inserts, by task id.
            snapshots: the states of the jobs that it resumes, by task id.

        Raises:
            SnapshotMismatch: a snapshot is of another configuration; nothing was dispatched.
        """
        snapshots = snapshots or {}
        for place in plan.resumed:
            snapshots[place.task_id].check(self.fingerprints[plan.lane])
        parked = self._take_off(plan.lane, plan.parked)
        if plan.resumed:
            self._put_back(plan.lane, {place: snapshots[place.task_id] for place in plan.resumed})
        todo = self._geometries[plan.lane].no_instructions()
        row = todo.phases
        for i, phases in enumerate(plan.devices):
            todo.num_phases[i] = len(phases)
            for p, phase in enumerate(phases):
                row.steps[i, p] = phase.steps
                if phase.decode:
                    row.decode_slot[i, p] = phase.decode[0]
                if phase.insert:
                    row.insert_slot[i, p], task_id = phase.insert
                    job = jobs[task_id]
                    row.prompt_ids[i, p], row.key_data[i, p], row.table[i, p] = job.prompt_ids, job.key_data, job.table
                    row.num_steps[i, p], row.guidance_scale[i, p] = job.num_inference_steps, job.guidance_scale
                    row.init_noise_sigma[i, p] = job.init_noise_sigma
        todo = put(todo, self.mesh, SHARDED)
        self._slots[plan.lane], decoded = self._programs[plan.lane](self.params, self._slots[plan.lane], todo)
        return Tick(plan, decoded, parked, self._preview(plan.lane, plan.previews) if plan.previews else None)

    def read_snapshot(self, data: bytes, job: PreparedJob) -> JobSnapshot:
        """Rebuild a job's snapshot from bytes that may come from anybody.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot of this job in this configuration.
        """
        snapshot = JobSnapshot.from_bytes(data, self._layouts)
        snapshot.check(self.fingerprints[job.lane])
        snapshot.check_job(job)
        return snapshot

    def accepts(self, snapshot: JobSnapshot) -> bool:
        """Whether a job can go on from a snapshot here, bit for bit."""
        return self.fingerprints.get(snapshot.lane) == snapshot.fingerprint

    def snapshot(self, lane: Lane, device: int, slot: int) -> JobSnapshot:
        """Copy a slot's whole state off its device; the slot keeps it. Same threads as `execute`."""
        (snapshot,) = self._take_off(lane, (Place("", device, slot),)).values()
        return snapshot

    def restore(self, lane: Lane, device: int, slot: int, snapshot: JobSnapshot) -> None:
        """Put a state into a slot, to go on there bit for bit. Same threads as `execute`.

        Raises:
            SnapshotMismatch: it was made by another configuration.
        """
        snapshot.check(self.fingerprints[lane])
        self._put_back(lane, {Place("", device, slot): snapshot})

    def generate(self, jobs: Sequence[PreparedJob], steps_per_tick: int = 8) -> list[DecodedImage]:
        """Run prepared jobs through the policy, all at once and without a worker; return images in the jobs' order.

        For notebooks, scripts and tests; nothing else may use the engine meanwhile.
        """
        costs = {lane: TickCosts(self.num_devices, Cost(1.0 / steps_per_tick)) for lane in self.resolutions}
        aggregator = Aggregator(costs, self.slots_per_device, self.phases_per_tick, tick_s=1.0)
        by_id = {job.task_id: job for job in jobs}
        for job in by_id.values():
            aggregator.add(job.task_id, job.lane, job.num_inference_steps, now=0.0)
        images: dict[str, DecodedImage] = {}
        ticks: deque[Tick] = deque()
        while (plan := aggregator.plan(now=0.0)) or ticks:
            if plan:
                ticks.append(self.execute(plan, by_id))
            if plan is None or len(ticks) == 2:
                images.update((image.task_id, image) for image in ticks.popleft().wait())
        return [images[job.task_id] for job in jobs]

    def reset(self) -> None:
        """Empty every slot, also after a program failed and took its donated state with it."""
        self._slots = {size: put(g.empty_slots(), self.mesh, SHARDED) for size, g in self._geometries.items()}

    def recover(self) -> None:
        """Empty every slot after a failure and prove that every device works: it draws a picture of the start again.

        Raises:
            EngineUnavailable: the pixels are others.
            Exception: what the device program raised.
        """
        self.reset()
        for lane, wanted in self._proofs.items():
            if not all(np.array_equal(got, wanted) for got in warmup.draw_proof(self, lane)):
                raise EngineUnavailable("a device does not give the pixels any more that it gave at the start")
        self.reset()

    def is_fatal(self, exc: Exception) -> bool:
        """Whether no other try on these devices can mend what a program raised: memory or a device is gone."""
        return isinstance(exc, RuntimeError | MemoryError) and any(
            text in str(exc) for text in (*OUT_OF_MEMORY, *_LOST)
        )

    def check_safety(self, pixels: np.ndarray) -> bool | None:
        """Run the checkpoint's safety checker on one image; None without one. May be called from any thread.

        Args:
            pixels: `(height, width, 3) uint8`.
        """
        if self._safety_check is None:
            return None
        from PIL import Image

        extractor: Any = self.checkpoint.feature_extractor
        features = extractor(Image.fromarray(pixels), return_tensors="np").pixel_values
        batch = np.zeros((self.num_devices, *features.shape[1:]), np.float32)
        batch[0] = features[0]
        wanted = np.arange(self.num_devices) == 0
        with self._safety_lock:
            flags = self._safety_check(self._safety_params, *put((batch, wanted), self.mesh, SHARDED))
        return bool(np.asarray(flags)[0])

    def _take_off(self, lane: Lane, places: Sequence[Place]) -> dict[str, JobSnapshot]:
        if not places:
            return {}
        slots = put(self._slot_of_each_device(places), self.mesh, SHARDED)
        states = self._programs[_SNAPSHOT, lane](self._slots[lane], slots)
        rows = [by_device(leaf) for leaf in states]
        snapshots = {}
        for place in places:
            arrays = SlotState(*(leaf[place.device] for leaf in rows))
            for array in arrays:
                array.copy_to_host_async()
            snapshots[place.task_id] = JobSnapshot(self.fingerprints[lane], lane, arrays)
        return snapshots

    def _preview(self, lane: Lane, places: Sequence[Place]) -> jax.Array:
        slots = put(self._slot_of_each_device(places), self.mesh, SHARDED)
        return self._programs[_PREVIEW, lane](self._colours[lane], self._slots[lane], slots)

    def _slot_of_each_device(self, places: Iterable[Place], otherwise: int = 0) -> np.ndarray:
        """Return `(D,) int32`."""
        slots = np.full(self.num_devices, otherwise, np.int32)
        for place in places:
            slots[place.device] = place.slot
        return slots

    def _put_back(self, lane: Lane, snapshots: Mapping[Place, JobSnapshot]) -> None:
        slots, states = self._slot_of_each_device(snapshots, NOTHING), self._geometries[lane].empty_states()
        for place, snapshot in snapshots.items():
            for leaf, row in zip(states, snapshot.state, strict=True):
                leaf[place.device] = row[0]
        restored = self._programs[_RESTORE, lane](self._slots[lane], *put((slots, states), self.mesh, SHARDED))
        self._slots[lane] = restored

    def _warm_up(self) -> None:
        """Really run every program, and learn from it what work costs and what pictures of the start look like."""
        for lane in self.resolutions:
            self.restore(lane, 0, 0, self.snapshot(lane, 0, 0))
            self.costs[lane] = warmup.measure_costs(self, lane)
            self._proofs[lane] = warmup.draw_proof(self, lane)[0]
            if (_PREVIEW, lane) in self._programs:
                self._colours[lane] = put(warmup.fit_colours(self, lane), self.mesh, REPLICATED)
        self.reset()
        if self._safety_check is not None:
            self.check_safety(np.zeros((*self.resolutions[0], 3), np.uint8))


def choose_dtype(name: str, platform: str) -> Any:
    """Return the dtype that `sdtpu_dtype` names; `auto` is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return {"bfloat16": jnp.bfloat16, "float32": jnp.float32}[name]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().split("\n", 1)[0]
