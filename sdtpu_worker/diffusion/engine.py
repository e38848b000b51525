"""Slots on the devices: the engine prepares jobs on the host, executes plans and returns decoded pixels.

The engine never chooses: a plan says for each device which slot to decode, which job to insert, how many steps to
take, and which job's state leaves its slot or comes back. The engine knows nothing of Celery.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import Lane, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.protocols import ServingEngine
from sdtpu_worker.diffusion import failures
from sdtpu_worker.diffusion.adapter_bank import Entries, make_bank
from sdtpu_worker.diffusion.background import Background
from sdtpu_worker.diffusion.cache import CompileCache, TraceCounter
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.compilation import CompiledPrograms
from sdtpu_worker.diffusion.engine_info import describe_engine
from sdtpu_worker.diffusion.engine_io import Calibration, Tick
from sdtpu_worker.diffusion.families.family import Params
from sdtpu_worker.diffusion.instructions import InstructionMaker
from sdtpu_worker.diffusion.loading_checkpoint import LoadingCheckpoint
from sdtpu_worker.diffusion.memory import bytes_per_device, check_fits, memory_needs, memory_of
from sdtpu_worker.diffusion.pixel_digest import pixel_digests
from sdtpu_worker.diffusion.preparation import PreparedJob, prepare_job
from sdtpu_worker.diffusion.program_setting import Setting, compile_setting, sizes_of
from sdtpu_worker.diffusion.reference_image import find_lost_devices
from sdtpu_worker.diffusion.safety import SafetyChecker
from sdtpu_worker.diffusion.sharding import REPLICATED, SHARDED, make_mesh, platform_of, put
from sdtpu_worker.diffusion.slot_states import copy_states, slot_of_each_device, write_states
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.diffusion.snapshot import JobSnapshot, fingerprint_of, layout_of
from sdtpu_worker.models.kernel_table import AUTO, check_wanted

logger = logging.getLogger(__name__)


class Engine:
    """A checkpoint replicated over devices, with compiled programs and slots for each resolution.

    A new engine has compiled its programs and can execute plans. Costs, previews and the proof that `recover` demands
    need what `calibrate(engine)` measures; `start.make_warm_engine` does both.

    Any thread may call `prepare`, `accepts`, `read_snapshot`, `check_safety` and the properties; one thread at a time
    the other methods.

    Args:
        checkpoint: the model; its weights are waited for when the programs are there.
        devices: the devices to use.
        slots_per_device: rows of each device's batch; fixed for good, since pixels are bitwise equal only within
            one compiled configuration.
        resolutions: `(height, width)` pairs in pixels; default: the checkpoint's own.
        compile_cache: the persistent compilation cache, for its counts.
        with_previews: compile the programs that plans with previews need.
        vae_tiling: `on` decodes images in tiles, `off` does not, `auto` does if the programs do not fit without.
        attention: how attentions are computed, see `sdtpu_attention`.
        on_phase: called with what begins, as `start_engine` is.

    Attributes:
        info: what the worker reads of the engine.
        has_previews: plans may ask for previews.
        bank: the LoRAs of single jobs on the devices; None for a worker whose jobs name none.
        fingerprints: by lane, what a snapshot's fingerprint must be to resume from it here.

    Raises:
        ConfigurationError: a resolution does not fit the model, the model does not fit the devices' memory, or the
            devices have not the attention that is asked for.
        InvalidCheckpoint: the parameters do not fit the configs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | LoadingCheckpoint,
        devices: list[jax.Device],
        slots_per_device: int = 1,
        resolutions: tuple[Lane, ...] | None = None,
        compile_cache: CompileCache | None = None,
        with_previews: bool = False,
        vae_tiling: str = "auto",
        attention: str = AUTO,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.has_previews, self.mesh = with_previews, make_mesh(devices)
        setting = Setting(slots_per_device, resolutions, with_previews, vae_tiling, attention)
        sizes = sizes_of(checkpoint.outline, setting)
        check_wanted(platform_of(devices[0]), attention)
        check_fits(devices[0], memory_needs(sizes.parameters, adapters=sizes.bank))  # before minutes of compiling
        placed = Background(partial(_place, checkpoint, self.mesh), name="sdtpu-placing")

        def check_memory(geometries: Mapping[Lane, Geometry], programs: CompiledPrograms) -> None:
            slots = sum(bytes_per_device(each.empty_slots(), len(devices)) for each in geometries.values())
            check_fits(devices[0], memory_needs(sizes.parameters, slots, programs.ticks.values(), sizes.bank))

        on_phase(f"loading or compiling programs for {slots_per_device} slots per device")
        self._geometries, self._programs = compile_setting(
            checkpoint.outline, setting, self.mesh, compile_cache, check_memory, placed.check
        )
        on_phase("waiting for the weights")
        self.params, safety_params = placed.result()
        self.checkpoint = checkpoint = checkpoint.wait()
        self._layouts = {lane: layout_of(geometry) for lane, geometry in self._geometries.items()}
        kind = devices[0].device_kind
        self.fingerprints = {
            lane: fingerprint_of(checkpoint, lane, geometry, kind) for lane, geometry in self._geometries.items()
        }
        self._safety, checker = None, checkpoint.safety_checker
        if checker is not None and self._programs.safety_check is not None:
            self._safety = SafetyChecker(self._programs.safety_check, safety_params, checker.extractor, self.mesh)
        self.info = describe_engine(checkpoint, devices, self._geometries, self._programs)
        self._instructions = {lane: InstructionMaker(each, self.mesh) for lane, each in self._geometries.items()}
        self.bank = make_bank(
            sizes.layout, sizes.entries, self.mesh, self._programs.empty_bank, self._programs.fill_bank
        )
        self._calibration: Calibration | None = None
        self._preview_colours: dict[Lane, jax.Array] = {}
        self.reset()
        self._traces = TraceCounter()
        self._unregister = weakref.finalize(self, self._traces.close)

    @property
    def params(self) -> Params:
        """The parameters on the devices; ticks use those that were set last."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params, self._leaves = params, tuple(jax.tree.leaves(params))

    def adopt(self, calibration: Calibration) -> None:
        """Take over what `calibrate` measured: the engine is ready, with empty slots, and counts traces from now on."""
        self._calibration = calibration
        colours = calibration.preview_colours
        self._preview_colours = {lane: put(of_lane, self.mesh, REPLICATED) for lane, of_lane in colours.items()}
        self.reset()
        self._traces.restart()

    @property
    def calibration(self) -> Calibration:
        """What `adopt` took over.

        Raises:
            RuntimeError: nothing yet.
        """
        if self._calibration is None:
            raise RuntimeError(
                "the engine is not calibrated: make it with start.make_warm_engine, or call"
                " engine.adopt(calibrate(engine))"
            )
        return self._calibration

    @property
    def costs(self) -> Mapping[Lane, TickCosts]:
        """What work costs, by lane; a policy corrects these with every tick.

        Raises:
            RuntimeError: the engine is not calibrated.
        """
        return self.calibration.costs

    @property
    def lost_devices(self) -> Collection[int]:
        """Devices that did not draw the reference image as most devices did when the engine was calibrated."""
        return self.calibration.lost_devices

    @property
    def traces_since_ready(self) -> int:
        """How many programs this process traced or compiled since the engine was ready; its own are none of them."""
        return self._traces.count()

    def prepare(
        self,
        task_id: str,
        request: GenerationRequest,
        pictures: Mapping[str, Any] | None = None,
        key_data: np.ndarray | None = None,
    ) -> PreparedJob:
        """Do the host's part of a job: tokenise, make the coefficient table and the key.

        Args:
            task_id: names the job in plans.
            request: with a seed, unless `key_data` is given.
            pictures: the request's pictures, by parameter: `image`, `(height, width, 3) uint8`; `mask_image`,
                `(height, width) bool`, True where the image is drawn again; `control_image`, a list of images.
            key_data: `(2,) uint32`, raw key words (for split keys), instead of the request's seed.

        Raises:
            InvalidRequest: this engine does not serve the size or the sampler, or there is no seed.
        """
        return prepare_job(self.checkpoint, self._geometries, task_id, request, key_data, pictures or {})

    def execute(
        self, plan: Plan, jobs: Mapping[str, PreparedJob], snapshots: Mapping[str, JobSnapshot] | None = None
    ) -> Tick:
        """Dispatch a plan and return without waiting for the devices.

        Args:
            plan: what every device does.
            jobs: by task id, the prepared jobs that the plan inserts.
            snapshots: by task id, the snapshots of the jobs that the plan resumes.

        Raises:
            SnapshotMismatch: a snapshot is of another configuration; nothing was dispatched.
        """
        snapshots = snapshots or {}
        for place in plan.resumed:
            snapshots[place.task_id].check(self.fingerprints[plan.lane])
        parked = self._take_off(plan.lane, plan.parked)
        resumed = {place: snapshots[place.task_id] for place in plan.resumed}
        entries = {} if self.bank is None else self.bank.place(plan, jobs, snapshots)
        if resumed:
            self._put_back(plan.lane, resumed, entries)
        todo = self._instructions[plan.lane].make(plan, jobs, entries)
        bank = None if self.bank is None else self.bank.arrays
        tick = self._programs.ticks[plan.lane]
        self._slots[plan.lane], decoded = tick(self._leaves, self._slots[plan.lane], todo, bank)
        return Tick(plan, decoded, parked, self._preview(plan.lane, plan.previews) if plan.previews else None)

    def read_snapshot(self, data: bytes, job: PreparedJob) -> JobSnapshot:
        """Read a job's snapshot from bytes of any origin.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot of this job in this configuration.
        """
        snapshot = JobSnapshot.from_bytes(data, self._layouts)
        snapshot.check(self.fingerprints[job.lane])
        snapshot.check_job(job)
        return dataclasses.replace(snapshot, adapters=job.adapters)

    def pixel_digests(self) -> Callable[[PreparedJob], str]:
        """Return what gives a digest of everything that decides a job's pixels here; reads every weight once."""
        return pixel_digests(self.checkpoint, self.fingerprints)

    def accepts(self, snapshot: JobSnapshot) -> bool:
        """Return whether a job can resume from a snapshot here, bit for bit."""
        return self.fingerprints.get(snapshot.lane) == snapshot.fingerprint

    def snapshot(self, lane: Lane, device: int, slot: int) -> JobSnapshot:
        """Copy a slot's whole state off its device; the slot keeps it."""
        (snapshot,) = self._take_off(lane, (Place("", device, slot),)).values()
        return snapshot

    def restore(self, lane: Lane, device: int, slot: int, snapshot: JobSnapshot) -> None:
        """Put a snapshot into a slot; the job continues there bit for bit.

        Raises:
            SnapshotMismatch: the snapshot was made by another configuration.
        """
        snapshot.check(self.fingerprints[lane])
        place = Place("", device, slot)
        plan = Plan(lane, ((),) * self.info.num_devices, resumed=(place,))
        entries = {} if self.bank is None else self.bank.place(plan, {}, {"": snapshot})
        self._put_back(lane, {place: snapshot}, entries)

    def reset(self) -> None:
        """Empty every slot, also after a program failed and took its donated state with it."""
        self._slots = {size: put(g.empty_slots(), self.mesh, SHARDED) for size, g in self._geometries.items()}
        if self.bank is not None:
            self.bank.reset()

    def recover(self, lost: Collection[int] = ()) -> frozenset[int]:
        """Empty every slot after a failure; then as `check_devices`."""
        self.reset()
        return self.check_devices(lost)

    def check_devices(self, lost: Collection[int] = ()) -> frozenset[int]:
        """Return the devices that do not draw the reference image as it was at the start; the slots must be free.

        Args:
            lost: devices that are lost already; they are not asked.

        Raises:
            EngineUnavailable: no device draws it.
            Exception: what the device program raised, whichever device is at work.
        """
        asked = [device for device in range(self.info.num_devices) if device not in lost]
        found = find_lost_devices(self, self.calibration.reference_images, asked)
        self.reset()
        return found

    def is_fatal(self, exc: Exception) -> bool:
        """Return whether no other try on these devices can mend what a program raised."""
        return failures.is_fatal(exc)

    def check_safety(self, pixels: np.ndarray) -> bool | None:
        """Return whether the checkpoint's safety checker flags an image; None if the checkpoint has none.

        Args:
            pixels: `(height, width, 3) uint8`.
        """
        return self._safety.flags(pixels) if self._safety is not None else None

    def memory(self) -> dict[int, dict[str, int]]:
        """Return the bytes of memory `used` by each device, at its `peak` and as its `limit`, if it says so."""
        return {number: memory_of(device) for number, device in enumerate(self.mesh.devices.flat)}

    def close(self) -> None:
        """Stop counting traces. An engine that is garbage does so by itself."""
        self._unregister()

    def _take_off(self, lane: Lane, places: Sequence[Place]) -> dict[str, JobSnapshot]:
        """Start copying the states of slots to the host."""
        if not places:
            return {}
        states = copy_states(self._programs.snapshots[lane], self._slots[lane], places, self.mesh)
        used = {place: None if self.bank is None else self.bank.used(lane, place) for place in places}
        fingerprint = self.fingerprints[lane]
        return {place.task_id: JobSnapshot(fingerprint, lane, states[place], used[place]) for place in places}

    def _put_back(self, lane: Lane, snapshots: Mapping[Place, JobSnapshot], entries: Entries) -> None:
        states = {place: snapshot.state for place, snapshot in snapshots.items()}
        program, geometry = self._programs.restores[lane], self._geometries[lane]
        self._slots[lane] = write_states(program, self._slots[lane], states, entries, geometry, self.mesh)

    def _preview(self, lane: Lane, places: Sequence[Place]) -> jax.Array:
        slots = put(slot_of_each_device(places, self.info.num_devices), self.mesh, SHARDED)
        return self._programs.previews[lane](self._preview_colours[lane], self._slots[lane], slots)


def _place(
    checkpoint: Checkpoint | LoadingCheckpoint, mesh: Mesh, go_on: Callable[[], None]
) -> tuple[Params, Params | None]:
    """Return the parameters of a model and of its safety checker on every device, when they are read."""
    whole = checkpoint.wait()
    checker = whole.safety_checker
    return put(whole.params, mesh, REPLICATED), None if checker is None else put(checker.params, mesh, REPLICATED)


if TYPE_CHECKING:
    _: type[ServingEngine] = Engine  # mypy reports here what an engine lacks of the contract
