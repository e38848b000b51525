"""Which LoRAs lie in which entry of each device's bank: filled before a tick with what its jobs need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

import jax
import numpy as np

from sdtpu_worker.aggregator.plan import Lane, Place, Plan
from sdtpu_worker.diffusion.adapters import AdapterLayout, JobAdapters, Stack
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import SHARDED, Mesh, put, replace_shards
from sdtpu_worker.diffusion.slots import NOTHING
from sdtpu_worker.diffusion.snapshot import JobSnapshot

Entries = Mapping[Place, int]
"""By the place where a job starts or resumes, what of its device's bank it uses."""


def num_entries(lanes: int, slots_per_device: int, phases: int) -> int:
    """Return how many entries a device needs so that no tick ever lacks one.

    One adds nothing. The slots of all lanes may hold jobs with LoRAs of their own, and every phase of a tick may insert
    another while the job that had its slot is still decoded.
    """
    return 1 + lanes * slots_per_device + phases


class AdapterBank:
    """The banks of all devices. The thread that executes plans owns it.

    An entry stays until another needs its place, so that jobs with the same LoRAs find them there. Of the entries that
    no slot uses, the one that was used longest ago goes first.

    Args:
        layout: how the adapters lie.
        entries: of every device.
        mesh: the devices.
        empty, fill: the compiled programs; see `programs.lower_empty_bank` and `lower_fill_bank`.

    Attributes:
        arrays: the banks, for ticks.
        fills: how many combinations were sent to a device so far.
    """

    def __init__(
        self, layout: AdapterLayout, entries: int, mesh: Mesh, empty: jax.stages.Compiled, fill: jax.stages.Compiled
    ) -> None:
        self._entries, self._mesh, self._empty, self._fill = entries, mesh, empty, fill
        self._nothing = put(layout.zeros(leading=(mesh.devices.size,)), mesh, SHARDED)
        self.fills = 0
        self.reset()

    def reset(self) -> None:
        """Empty all banks, also after a program failed and took them with it."""
        self.arrays: Stack = self._empty()
        # What lies in the entries of every device, the least recently used first.
        self._lying: list[dict[int, bytes | None]] = [
            dict.fromkeys(range(1, self._entries)) for _ in range(self._mesh.devices.size)
        ]
        # By lane, device and slot, until another job has it.
        self._used: dict[tuple[Lane, int, int], tuple[int, JobAdapters | None]] = {}

    def used(self, lane: Lane, place: Place) -> JobAdapters | None:
        """Return the LoRAs of the job that had a slot last."""
        return self._used.get((lane, place.device, place.slot), (0, None))[1]

    def place(self, plan: Plan, jobs: Mapping[str, PreparedJob], snapshots: Mapping[str, JobSnapshot]) -> Entries:
        """Bring what jobs need to their devices, and return where it is.

        Args:
            plan: what every device does.
            jobs: by task id, those that the plan inserts.
            snapshots: by task id, those of the jobs that it resumes.
        """
        for place in (*plan.parked, *plan.resumed):
            self._used.pop((plan.lane, place.device, place.slot), None)
        pinned: list[set[int]] = [set() for _ in self._lying]
        for (_, device, _), (entry, _) in self._used.items():
            pinned[device].add(entry)
        entries: dict[Place, int] = {}
        missing: list[dict[int, JobAdapters]] = [{} for _ in self._lying]
        wanted = _wanted(plan, jobs, snapshots)
        for place, adapters in wanted.items():
            if adapters is None:
                entries[place] = 0
                continue
            entry, is_there = self._find(place.device, adapters.key, pinned[place.device])
            pinned[place.device].add(entry)
            entries[place] = entry
            if not is_there:
                missing[place.device][entry] = adapters
        for place, adapters in wanted.items():
            self._used[plan.lane, place.device, place.slot] = entries[place], adapters
        self._send(missing)
        return entries

    def _find(self, device: int, key: bytes, pinned: Collection[int]) -> tuple[int, bool]:
        """Return the entry for a combination, now the most recently used, and whether the combination lies there."""
        lying = self._lying[device]
        entry = next((entry for entry, its_key in lying.items() if its_key == key), None)
        is_there = entry is not None
        if entry is None:
            entry = next(entry for entry in lying if entry not in pinned)  # `num_entries` says why there is one
        del lying[entry]
        lying[entry] = key
        return entry, is_there

    def _send(self, missing: Sequence[Mapping[int, JobAdapters]]) -> None:
        """Fill entries, one of each device at a time; only a device with one gets any data."""
        for one_each in zip_longest(*(each.items() for each in missing)):
            sent = {device: one for device, one in enumerate(one_each) if one}
            entry = np.full(len(missing), NOTHING, np.int32)
            for device, (number, _) in sent.items():
                entry[device] = number
            stacks = {device: adapters.stack for device, (_, adapters) in sent.items()}
            stack = replace_shards(self._nothing, stacks, self._mesh)
            self.arrays = self._fill(self.arrays, put(entry, self._mesh, SHARDED), stack)
            self.fills += len(sent)


def make_bank(
    layout: AdapterLayout | None,
    entries: int,
    mesh: Mesh,
    empty: jax.stages.Compiled | None,
    fill: jax.stages.Compiled | None,
) -> AdapterBank | None:
    """Return a bank; None for a worker whose jobs name no LoRAs. See `AdapterBank` for the arguments."""
    if layout is None or empty is None or fill is None:
        return None
    return AdapterBank(layout, entries, mesh, empty, fill)


def _wanted(
    plan: Plan, jobs: Mapping[str, PreparedJob], snapshots: Mapping[str, JobSnapshot]
) -> dict[Place, JobAdapters | None]:
    """Return the LoRAs of the jobs that a plan resumes, then of those that it inserts; None for a job without."""
    wanted = {place: snapshots[place.task_id].adapters for place in plan.resumed}
    for device, phases in enumerate(plan.devices):
        for slot, task_id in (phase.insert for phase in phases if phase.insert):
            wanted[Place(task_id, device, slot)] = jobs[task_id].adapters
    return wanted
