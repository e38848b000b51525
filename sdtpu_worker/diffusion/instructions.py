"""A plan as the arrays that the tick's program reads, with the pictures of its jobs on the devices that need them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtpu_worker.aggregator.plan import Place, Plan
from sdtpu_worker.diffusion.adapter_bank import Entries
from sdtpu_worker.diffusion.adapters import digest_of
from sdtpu_worker.diffusion.packed_instructions import InstructionPacking, PackedInstructions
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import SHARDED, Mesh, put, replace_shards
from sdtpu_worker.diffusion.slots import Geometry


class InstructionMaker:
    """Makes the instructions of one lane's ticks.

    Args:
        geometry: the sizes.
        mesh: the devices.
    """

    def __init__(self, geometry: Geometry, mesh: Mesh) -> None:
        self._geometry, self._mesh, self._packing = geometry, mesh, InstructionPacking(geometry)
        self._no_pictures = put(geometry.no_pictures(geometry.num_devices), mesh, SHARDED)

    def make(self, plan: Plan, jobs: Mapping[str, PreparedJob], entries: Entries) -> PackedInstructions:
        """Return a plan's instructions on the devices.

        Args:
            plan: what every device does.
            jobs: by task id, the prepared jobs that the plan inserts.
            entries: where their LoRAs lie; empty for a worker whose jobs name none.
        """
        words, todo = self._packing.no_instructions()
        row = todo.phases
        for i, phases in enumerate(plan.devices):
            todo.num_phases[i] = len(phases)
            for p, phase in enumerate(phases):
                row.steps[i, p] = phase.steps
                if phase.decode:
                    row.decode_slot[i, p] = phase.decode[0]
                if phase.insert:
                    row.insert_slot[i, p], task_id = phase.insert
                    _insert(row, i, p, jobs[task_id], entries.get(Place(task_id, i, phase.insert[0]), 0))
        pictures = dict(self._put_pictures(plan, jobs))
        return PackedInstructions(put(words, self._mesh, SHARDED), pictures)

    def _put_pictures(self, plan: Plan, jobs: Mapping[str, PreparedJob]) -> Mapping[str, Any]:
        """Return the pictures of the jobs that a plan inserts, on the devices; only a device with one gets any."""
        none, geometry = self._no_pictures, self._geometry
        brought = {
            device: by_phase
            for device, phases in enumerate(plan.devices)
            if (by_phase := {p: jobs[phase.insert[1]] for p, phase in enumerate(phases) if phase.insert})
            and any(job.image is not None or job.controls for job in by_phase.values())
        }
        if not brought:
            return none
        hosts = {}
        for device, by_phase in brought.items():
            host = geometry.no_pictures(1)
            for p, job in by_phase.items():
                if job.image is not None:
                    host["image"][0, p], host["mask"][0, p] = job.image, True if job.mask is None else job.mask
                for control in job.controls:
                    host["control_images"][0, p, control.number] = control.image
            hosts[device] = host
        on_devices: Mapping[str, Any] = replace_shards(none, hosts, self._mesh)
        return on_devices


def _insert(row: Any, device: int, phase: int, job: PreparedJob, entry: int) -> None:
    """Write a job that starts into the arrays of the phases."""
    at = device, phase
    for name, array in job.inputs.items():
        row.inputs[name][at] = array
    row.key_data[at], row.table[at] = job.key_data, job.table
    row.num_steps[at], row.first_level[at] = job.num_steps, job.first_level
    row.guidance_scale[at], row.guidance_rescale[at] = job.guidance_scale, job.guidance_rescale
    row.image_guidance_scale[at], row.has_image[at] = job.image_guidance_scale, job.image is not None
    for control in job.controls:
        row.control_scale[(*at, control.number)] = control.scale
        row.control_first[(*at, control.number)] = control.first
        row.control_end[(*at, control.number)] = control.end
    if row.adapters is not None:
        row.adapters.entry[at] = entry
        row.adapters.digest[at] = digest_of(job.adapters)
