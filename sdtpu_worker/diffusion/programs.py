"""The compiled programs. One fused tick per resolution; inside it every device follows its own instructions.

Parameters are replicated; all other arrays are sharded over the mesh's one axis. Nothing crosses devices, so there is
no collective and a device with nothing to do costs nothing. What the model is, its family says: see
`families/family.py`. Shapes below are as in `slots.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdtpu_worker.diffusion.adapters import AdapterLayout, Stack
from sdtpu_worker.diffusion.denoising import advance, decode, insert
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.packed_instructions import InstructionPacking, PackedInstructions
from sdtpu_worker.diffusion.samplers import COLUMNS
from sdtpu_worker.diffusion.sharding import REPLICATED, SHARDED, platform_of
from sdtpu_worker.diffusion.slots import Decoded, Geometry, Slots
from sdtpu_worker.models.selection import Selection, selecting

logger = logging.getLogger(__name__)

DECODE, INSERT, ADVANCE = "decode", "insert", "advance"
"""The names of a phase's parts in the compiled program, for profiles and for `sdtpu plan`."""


def lower_tick(family: Family, params: Any, geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the tick, ahead of time, for the mesh's devices; see `trace_tick`."""
    return trace_tick(family, params, geometry, mesh, platform_of(mesh.devices.flat[0])).lower()


def trace_tick(family: Family, params: Any, geometry: Geometry, mesh: Mesh, platform: str) -> jax.stages.Traced:
    """Trace the tick, ahead of time.

    Args:
        family: the model.
        params: its parameters on the mesh, replicated (arrays or shapes); every leaf makes a dispatch slower.
        geometry: the sizes.
        mesh: the devices.
        platform: what the kernels are chosen for, as the table of kernels calls it.

    Returns:
        What `.lower().compile()` makes `tick(leaves, slots, instructions, bank) -> (slots, Decoded)` of; the slots
        passed in are donated. The leaves are those of the parameters, in a tuple: to flatten dictionaries of thousands
        of arrays takes the host a third of a millisecond each time. The instructions are packed. The bank is that of
        `lower_empty_bank`, or None where the geometry has no adapters. A wrong shape, dtype or sharding is an error:
        the result never compiles again.
    """

    selection = Selection(platform, geometry.attention)

    packing, (leaves, structure) = InstructionPacking(geometry), jax.tree.flatten(params)

    def local_tick(
        leaves: tuple[Any, ...], slots: Slots, packed: PackedInstructions, bank: Stack | None
    ) -> tuple[Slots, Decoded]:
        params = jax.tree.unflatten(structure, leaves)
        packed = jax.tree.map(lambda leaf: leaf[0], packed)  # this device's own row
        todo = packing.unpack(packed.words, packed.pictures)

        def phase(i: jax.Array, carry: tuple[Slots, Decoded]) -> tuple[Slots, Decoded]:
            slots, decoded = carry
            now = jax.tree.map(lambda leaf: leaf[i], todo.phases)
            with jax.named_scope(DECODE):
                image = decode(family, geometry, params, slots, now.decode_slot)
            decoded = jax.tree.map(lambda all_, one: all_.at[0, i].set(one), decoded, image)
            with jax.named_scope(INSERT):
                slots = insert(family, geometry, params, slots, now, bank)
            with jax.named_scope(ADVANCE):
                return advance(family, geometry, params, slots, now.steps, bank), decoded

        pixels = jnp.zeros((1, geometry.phases, geometry.height, geometry.width, 3), jnp.uint8)
        nothing = Decoded(pixels, jnp.ones((1, geometry.phases), bool))
        with selecting(selection):
            return jax.lax.fori_loop(0, todo.num_phases, phase, (slots, nothing))

    tick = jax.shard_map(
        local_tick, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    layout, entries = geometry.adapters, geometry.num_devices * geometry.adapter_entries
    bank = None if layout is None else layout.shapes((entries,))
    instructions = packing.shapes(geometry.no_pictures(geometry.num_devices))
    shapes = sharded_shapes(mesh, (geometry.empty_slots(), instructions, bank))
    traced = jax.jit(tick, donate_argnums=1).trace(tuple(leaves), *shapes)
    for shape, choice in selection.chosen.items():
        logger.info("attention of %s: %s (%s)", shape, choice.implementation, choice.reason)
    return traced


def lower_snapshot(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that reads one slot of each device.

    Returns:
        What `.compile()` makes `snapshot(slots, slot (D,) int32) -> states` of; the slots stay as they are.
    """

    def local_snapshot(slots: Slots, slot: jax.Array) -> Slots:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot[0], 1), slots)

    return _lower_sharded(local_snapshot, mesh, geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32))


def lower_restore(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that writes one slot of each device.

    Returns:
        What `.compile()` makes `restore(slots, slot (D,) int32, states) -> slots` of; the slots passed in are donated,
        devices with the slot NOTHING keep theirs.
    """

    def local_restore(slots: Slots, slot: jax.Array, state: Slots) -> Slots:
        def write() -> Slots:
            put_row = jax.lax.dynamic_update_slice_in_dim
            return jax.tree.map(lambda leaf, row: put_row(leaf, row, slot[0], 0), slots, state)

        return jax.lax.cond(slot[0] >= 0, write, lambda: slots)

    shapes = geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32), geometry.empty_states()
    return _lower_sharded(local_restore, mesh, *shapes, donate=0)


def lower_empty_bank(layout: AdapterLayout, entries: int, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that makes a bank of adapters on the devices: nothing is sent to them for it.

    Args:
        layout: how the adapters lie.
        entries: of every device.
        mesh: the devices.

    Returns:
        What `.compile()` makes `empty() -> bank (D * entries, …)` of, all zeros.
    """

    def empty() -> Stack:
        bank: Stack = layout.zeros(jnp.zeros, (mesh.devices.size * entries,))
        return bank

    return jax.jit(empty, out_shardings=NamedSharding(mesh, SHARDED)).lower()


def lower_fill_bank(layout: AdapterLayout, entries: int, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that writes one entry of each device's bank.

    Args:
        layout, entries, mesh: as for `lower_empty_bank`.

    Returns:
        What `.compile()` makes `fill(bank, entry (D,) int32, stack (D, …)) -> bank` of; the bank passed in is donated,
        devices with the entry NOTHING keep theirs.
    """

    def local_fill(bank: Stack, entry: jax.Array, stack: Stack) -> Stack:
        def write() -> Stack:
            put_row = jax.lax.dynamic_update_slice_in_dim
            filled: Stack = jax.tree.map(lambda leaf, row: put_row(leaf, row, entry[0], 0), bank, stack)
            return filled

        filled: Stack = jax.lax.cond(entry[0] >= 0, write, lambda: bank)
        return filled

    num_devices = mesh.devices.size
    shapes = layout.shapes((num_devices * entries,)), np.zeros(num_devices, np.int32), layout.shapes((num_devices,))
    return _lower_sharded(local_fill, mesh, *shapes, donate=0)


def lower_preview(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that makes a small image of one slot of each device.

    Returns:
        What `.compile()` makes `preview(colours (C + 1, 3) float32, slots, slot (D,) int32) -> (D, h, w, 3) uint8`
        of: latents, scaled as the model sees them, times the first C rows of `colours`, plus the last.
    """

    def local_preview(colours: jax.Array, slots: Slots, slot: jax.Array) -> jax.Array:
        step, num_steps = slots.step[slot[0]], slots.num_steps[slot[0]]
        c_in = slots.table[slot[0], jnp.clip(step, 0, jnp.maximum(num_steps, 1) - 1), COLUMNS.index("c_in")]
        latents = jax.lax.dynamic_slice_in_dim(slots.latents, slot[0], 1) * c_in
        rgb = jnp.einsum("nchw,cd->nhwd", latents, colours[:-1]) + colours[-1]
        return jnp.round(jnp.clip(rgb, 0, 255)).astype(jnp.uint8)

    preview = jax.shard_map(
        local_preview, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    colours = jax.ShapeDtypeStruct(
        (geometry.latent_shape[0] + 1, 3), jnp.float32, sharding=NamedSharding(mesh, REPLICATED)
    )
    shapes = sharded_shapes(mesh, (geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32)))
    return jax.jit(preview).lower(colours, *shapes)


def sharded_shapes(mesh: Mesh, tree: Any) -> Any:
    """Return shapes and dtypes of arrays that are split along their first axis."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _lower_sharded(local: Any, mesh: Mesh, *arrays: Any, donate: int | tuple[int, ...] = ()) -> jax.stages.Lowered:
    program = jax.shard_map(local, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)
    return jax.jit(program, donate_argnums=donate).lower(*sharded_shapes(mesh, arrays))
