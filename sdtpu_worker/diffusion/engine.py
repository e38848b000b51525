"""Slots on the devices: the engine prepares jobs on the host, executes plans and returns decoded pixels.

The engine never chooses: a plan says for each device which slot to decode, which job to insert, how many steps to
take, and which job's state leaves its slot or comes back. The engine knows nothing of Celery.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import Lane, Place, Plan, phases_per_tick
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.protocols import EngineInfo, ServingEngine
from sdtpu_worker.diffusion import failures
from sdtpu_worker.diffusion.adapter_bank import Entries, make_bank, num_entries
from sdtpu_worker.diffusion.cache import CompileCache, TraceCounter
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.compilation import CompiledPrograms, compile_programs, in_tiles_if_needed
from sdtpu_worker.diffusion.engine_io import Calibration, Tick
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.instructions import InstructionMaker
from sdtpu_worker.diffusion.memory import bytes_per_device, check_fits, memory_needs, memory_of
from sdtpu_worker.diffusion.pixel_digest import pixel_digests
from sdtpu_worker.diffusion.preparation import PreparedJob, format_size, prepare_job
from sdtpu_worker.diffusion.reference_image import find_lost_devices
from sdtpu_worker.diffusion.safety import SafetyChecker
from sdtpu_worker.diffusion.sharding import REPLICATED, SHARDED, by_device, make_mesh, put
from sdtpu_worker.diffusion.slots import NOTHING, Geometry, Slots
from sdtpu_worker.diffusion.snapshot import JobSnapshot, fingerprint_of, layout_of
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.kernel_table import AUTO, check_wanted

logger = logging.getLogger(__name__)


class Engine:
    """A checkpoint replicated over devices, with compiled programs and slots for each resolution.

    A new engine has compiled its programs and can execute plans. Costs, previews and the proof that `recover` demands
    need what `calibrate(engine)` measures; `start.make_warm_engine` does both.

    Any thread may call `prepare`, `accepts`, `read_snapshot`, `check_safety` and the properties; one thread at a time
    the other methods.

    Args:
        checkpoint: the loaded model.
        devices: the devices to use.
        slots_per_device: rows of each device's batch; fixed for good, since pixels are bitwise equal only within
            one compiled configuration.
        resolutions: `(height, width)` pairs in pixels; default: the checkpoint's own.
        compile_cache: the persistent compilation cache, for its counts.
        with_previews: compile the programs that plans with previews need.
        vae_tiling: `on` decodes images in tiles, `off` does not, `auto` does if the programs do not fit without.
        attention: how attentions are computed, see `sdtpu_attention`.

    Attributes:
        info: what the worker reads of the engine.
        has_previews: plans may ask for previews.
        params: the parameters on the devices.
        bank: the LoRAs of single jobs on the devices; None for a worker whose jobs name none.
        fingerprints: by lane, what a snapshot's fingerprint must be to resume from it here.

    Raises:
        ConfigurationError: a resolution does not fit the model, the model does not fit the devices' memory, or the
            devices have not the attention that is asked for.
        InvalidCheckpoint: the parameters do not fit the configs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        devices: list[jax.Device],
        slots_per_device: int = 1,
        resolutions: tuple[Lane, ...] | None = None,
        compile_cache: CompileCache | None = None,
        with_previews: bool = False,
        vae_tiling: str = "auto",
        attention: str = AUTO,
    ) -> None:
        self.checkpoint, self.has_previews, self.mesh = checkpoint, with_previews, make_mesh(devices)
        family = checkpoint.family
        lanes = tuple(dict.fromkeys(resolutions or (family.default_size,)))
        check_sizes(family, lanes)
        check_wanted(devices[0].platform, attention)
        parameters = bytes_per_device(checkpoint.params)
        layout = None if checkpoint.adapters is None else checkpoint.adapters.layout
        entries = num_entries(len(lanes), slots_per_device, phases_per_tick(slots_per_device))
        bank = (entries + 1) * layout.entry_bytes if layout else 0  # one stands for nothing while others are sent
        check_fits(devices[0], memory_needs(parameters, adapters=bank))  # before minutes of compiling
        self.params = put(checkpoint.params, self.mesh, REPLICATED)
        checker = checkpoint.safety_checker
        safety_params = None if checker is None else put(checker.params, self.mesh, REPLICATED)

        def compile_all(in_tiles: bool) -> tuple[dict[Lane, Geometry], CompiledPrograms]:
            sizes = len(devices), slots_per_device
            geometries = {
                lane: Geometry.of(family, *sizes, lane, in_tiles, layout, entries, attention) for lane in lanes
            }
            programs = compile_programs(
                checkpoint, self.params, safety_params, geometries, self.mesh, with_previews, compile_cache
            )
            slots = sum(bytes_per_device(each.empty_slots(), len(devices)) for each in geometries.values())
            check_fits(devices[0], memory_needs(parameters, slots, programs.ticks.values(), bank))
            return geometries, programs

        self._geometries, self._programs = in_tiles_if_needed(compile_all, vae_tiling)
        self._layouts = {lane: layout_of(geometry) for lane, geometry in self._geometries.items()}
        kind = devices[0].device_kind
        self.fingerprints = {
            lane: fingerprint_of(checkpoint, lane, geometry, kind) for lane, geometry in self._geometries.items()
        }
        self._safety = None
        if checker is not None and self._programs.safety_check is not None:
            self._safety = SafetyChecker(self._programs.safety_check, safety_params, checker.extractor, self.mesh)
        self.info = _describe(checkpoint, devices, self._geometries, self._programs)
        self._instructions = {lane: InstructionMaker(each, self.mesh) for lane, each in self._geometries.items()}
        self.bank = make_bank(layout, entries, self.mesh, self._programs.empty_bank, self._programs.fill_bank)
        self._calibration: Calibration | None = None
        self._preview_colours: dict[Lane, jax.Array] = {}
        self.reset()
        self._traces = TraceCounter()
        self._unregister = weakref.finalize(self, self._traces.close)

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
        self._slots[plan.lane], decoded = tick(self.params, self._slots[plan.lane], todo, bank)
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
        slots = put(self._slot_of_each_device(places), self.mesh, SHARDED)
        states = self._programs.snapshots[lane](self._slots[lane], slots)
        leaves, structure = jax.tree.flatten(states)
        rows = [by_device(leaf) for leaf in leaves]
        snapshots = {}
        for place in places:
            arrays: Slots = jax.tree.unflatten(structure, [leaf[place.device] for leaf in rows])
            for array in jax.tree.leaves(arrays):
                array.copy_to_host_async()
            adapters = None if self.bank is None else self.bank.used(lane, place)
            snapshots[place.task_id] = JobSnapshot(self.fingerprints[lane], lane, arrays, adapters)
        return snapshots

    def _put_back(self, lane: Lane, snapshots: Mapping[Place, JobSnapshot], entries: Entries) -> None:
        slots, states = self._slot_of_each_device(snapshots, NOTHING), self._geometries[lane].empty_states()
        for place, snapshot in snapshots.items():
            for leaf, row in zip(jax.tree.leaves(states), jax.tree.leaves(snapshot.state), strict=True):
                leaf[place.device] = row[0]
            if states.adapters is not None:
                states.adapters.entry[place.device] = entries[place]
        restored = self._programs.restores[lane](self._slots[lane], *put((slots, states), self.mesh, SHARDED))
        self._slots[lane] = restored

    def _preview(self, lane: Lane, places: Sequence[Place]) -> jax.Array:
        slots = put(self._slot_of_each_device(places), self.mesh, SHARDED)
        return self._programs.previews[lane](self._preview_colours[lane], self._slots[lane], slots)

    def _slot_of_each_device(self, places: Iterable[Place], otherwise: int = 0) -> np.ndarray:
        """Return `(D,) int32`."""
        slots = np.full(self.info.num_devices, otherwise, np.int32)
        for place in places:
            slots[place.device] = place.slot
        return slots


def check_sizes(family: Family, lanes: Iterable[Lane]) -> None:
    """Make sure that the model can draw images of these sizes.

    Raises:
        ConfigurationError: it cannot.
    """
    for lane in lanes:
        if any(side % family.size_multiple for side in lane):
            raise ConfigurationError(
                f"sdtpu_resolutions must be multiples of {family.size_multiple} pixels for this checkpoint,"
                f" got {format_size(lane)}"
            )


def _describe(
    checkpoint: Checkpoint,
    devices: Sequence[jax.Device],
    geometries: Mapping[Lane, Geometry],
    programs: CompiledPrograms,
) -> EngineInfo:
    geometry = next(iter(geometries.values()))
    return EngineInfo(
        model=checkpoint.name,
        default_sampler=checkpoint.defaults.sampler,
        dtype=checkpoint.dtype.__name__,
        platform=devices[0].platform,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        slots_per_device=geometry.slots_per_device,
        phases_per_tick=geometry.phases,
        resolutions=tuple(geometries),
        load_s=programs.load_s,
        trace_s=programs.trace_s,
        compile_s=programs.compile_s,
        kept_programs=programs.kept,
        cache_hits=programs.cache_hits,
        cache_misses=programs.cache_misses,
        default_steps=checkpoint.defaults.num_inference_steps,
        loras=tuple((lora.name, lora.weight) for lora in checkpoint.loras),
    )


if TYPE_CHECKING:
    _: type[ServingEngine] = Engine  # mypy reports here what an engine lacks of the contract
