"""The states of single slots on their way between the devices and the host, at most one of each device at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sdtpu_worker.aggregator.plan import Place
from sdtpu_worker.diffusion.sharding import SHARDED, by_device, put
from sdtpu_worker.diffusion.slots import NOTHING, Geometry, Slots


def copy_states(program: Callable[..., Any], slots: Slots, places: Sequence[Place], mesh: Mesh) -> dict[Place, Slots]:
    """Start copying the states of slots to the host; the slots keep them.

    Args:
        program: takes one slot of each device out of all; see `CompiledPrograms.snapshots`.
        slots: of a lane, on the devices.
        places: at most one of each device.
        mesh: the devices.

    Returns:
        `Slots` of `(1, …)` arrays, on their way.
    """
    of_devices = program(slots, put(slot_of_each_device(places, mesh.devices.size), mesh, SHARDED))
    leaves, structure = jax.tree.flatten(of_devices)
    rows = [by_device(leaf) for leaf in leaves]
    states: dict[Place, Slots] = {}
    for place in places:
        states[place] = jax.tree.unflatten(structure, [leaf[place.device] for leaf in rows])
        for array in jax.tree.leaves(states[place]):
            array.copy_to_host_async()
    return states


def write_states(
    program: Callable[..., Slots],
    slots: Slots,
    states: Mapping[Place, Slots],
    entries: Mapping[Place, int],
    geometry: Geometry,
    mesh: Mesh,
) -> Slots:
    """Send states from the host into slots, and return all slots; those that were given are used up.

    Args:
        program: writes one slot of each device; see `CompiledPrograms.restores`.
        slots: of a lane, on the devices.
        states: `Slots` of `(1, …)` host arrays, for at most one place of each device.
        entries: where in the bank of its device each job's LoRAs lie.
        geometry: of the lane.
        mesh: the devices.
    """
    sent = geometry.empty_states()
    for place, state in states.items():
        for leaf, row in zip(jax.tree.leaves(sent), jax.tree.leaves(state), strict=True):
            leaf[place.device] = row[0]
        if sent.adapters is not None:
            sent.adapters.entry[place.device] = entries[place]
    where = slot_of_each_device(states, geometry.num_devices, NOTHING)
    return program(slots, *put((where, sent), mesh, SHARDED))


def slot_of_each_device(places: Iterable[Place], num_devices: int, otherwise: int = 0) -> np.ndarray:
    """Return the slots of some places, `(D,) int32`; `otherwise` for a device with none of them."""
    slots = np.full(num_devices, otherwise, np.int32)
    for place in places:
        slots[place.device] = place.slot
    return slots
