"""What decides the programs of a worker besides its model, and all of them for it: here, or ahead of time elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sdtpu_worker.aggregator.plan import Lane, phases_per_tick
from sdtpu_worker.diffusion.adapter_bank import num_entries
from sdtpu_worker.diffusion.adapters import AdapterLayout
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.compilation import (
    TICK,
    CompiledPrograms,
    compile_programs,
    in_tiles_if_needed,
    kept_programs_of,
)
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.diffusion.preparation import format_size
from sdtpu_worker.diffusion.sharding import REPLICATED
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.kernel_table import AUTO


@dataclass(frozen=True)
class Setting:
    """What decides an engine's programs besides the model and the devices; see `Engine`."""

    slots_per_device: int = 1
    resolutions: tuple[Lane, ...] | None = None
    with_previews: bool = False
    vae_tiling: str = "auto"
    attention: str = AUTO


@dataclass(frozen=True)
class Sizes:
    """What follows from a checkpoint and a setting.

    Attributes:
        lanes: the resolutions, each once.
        layout: how LoRAs of single jobs lie; None for a worker whose jobs name none.
        entries: of each device's bank of LoRAs.
        parameters, bank: bytes of the parameters and of the bank on each device.
    """

    lanes: tuple[Lane, ...]
    layout: AdapterLayout | None
    entries: int
    parameters: int
    bank: int


def sizes_of(checkpoint: Checkpoint, setting: Setting) -> Sizes:
    """Return what follows from a checkpoint, of which shapes are enough, and a setting.

    Raises:
        ConfigurationError: the model cannot draw images of these sizes.
    """
    lanes = tuple(dict.fromkeys(setting.resolutions or (checkpoint.family.default_size,)))
    check_sizes(checkpoint.family, lanes)
    layout = None if checkpoint.adapters is None else checkpoint.adapters.layout
    entries = num_entries(len(lanes), setting.slots_per_device, phases_per_tick(setting.slots_per_device))
    bank = (entries + 1) * layout.entry_bytes if layout else 0  # one stands for nothing while others are sent
    return Sizes(lanes, layout, entries, bytes_per_device(checkpoint.params), bank)


def compile_setting(
    checkpoint: Checkpoint,
    setting: Setting,
    mesh: Mesh,
    cache: CompileCache | None,
    check_memory: Callable[[Mapping[Lane, Geometry], CompiledPrograms], None] = lambda geometries, programs: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[Lane, Geometry], CompiledPrograms]:
    """Return the geometries and all programs of an engine, loaded or compiled from shapes.

    Args:
        checkpoint: the model; only shapes and dtypes of its parameters count.
        setting: the setting.
        mesh: the devices, which need not be here.
        cache: see `compile_programs`.
        check_memory: raises `ConfigurationError` if the programs do not fit the devices' memory with all else.
        check: called from time to time; what it raises ends the compiling.

    Raises:
        ConfigurationError: the sizes are wrong, or the programs do not fit.
        InvalidCheckpoint: the parameters do not fit the configs.
    """
    params = shapes_on_mesh(checkpoint, mesh)
    keep = None
    if cache is not None and (cache.programs or cache.ahead):
        keep = kept_programs_of(checkpoint, params[0], mesh, cache.programs, cache.ahead)

    def compile_all(in_tiles: bool) -> tuple[dict[Lane, Geometry], CompiledPrograms]:
        geometries = geometries_of(checkpoint, setting, mesh, in_tiles)
        programs = compile_programs(checkpoint, *params, geometries, mesh, setting.with_previews, cache, keep, check)
        check_memory(geometries, programs)
        return geometries, programs

    def has_ticks(in_tiles: bool) -> bool:
        geometries = geometries_of(checkpoint, setting, mesh, in_tiles)
        return keep is not None and all(keep.find(TICK, lane, geometry) for lane, geometry in geometries.items())

    tiling = setting.vae_tiling
    if tiling == "auto" and has_ticks(in_tiles=True) and not has_ticks(in_tiles=False):
        tiling = "on"  # an earlier start, or `sdtpu compile`, found no room for the others
    return in_tiles_if_needed(compile_all, tiling)


def shapes_on_mesh(checkpoint: Checkpoint, mesh: Mesh) -> tuple[Any, Any | None]:
    """Return the shapes of a model's parameters, replicated on a mesh, and those of its safety checker's."""
    sharding = NamedSharding(mesh, REPLICATED)

    def on_mesh(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    checker = checkpoint.safety_checker
    return on_mesh(checkpoint.params), None if checker is None else on_mesh(checker.params)


def geometries_of(checkpoint: Checkpoint, setting: Setting, mesh: Mesh, in_tiles: bool) -> dict[Lane, Geometry]:
    """Return the sizes of every lane.

    Args:
        checkpoint, setting, mesh: as for `compile_setting`.
        in_tiles: decode images in tiles.
    """
    sizes = sizes_of(checkpoint, setting)
    counts = mesh.devices.size, setting.slots_per_device
    return {
        lane: Geometry.of(checkpoint.family, *counts, lane, in_tiles, sizes.layout, sizes.entries, setting.attention)
        for lane in sizes.lanes
    }


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
