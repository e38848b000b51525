"""All programs of an engine, traced and compiled ahead of time: nothing compiles while the engine serves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.memory import WHAT_MAKES_IT_SMALLER
from sdtpu_worker.diffusion.programs import (
    lower_empty_bank,
    lower_fill_bank,
    lower_preview,
    lower_restore,
    lower_snapshot,
    lower_tick,
)
from sdtpu_worker.diffusion.safety import lower_safety_check
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint

_TICK, _SNAPSHOT, _RESTORE, _PREVIEW, _SAFETY = "tick", "snapshot", "restore", "preview", "safety check"
_EMPTY_BANK, _FILL_BANK = "empty bank", "fill bank"


@dataclass(frozen=True)
class CompiledPrograms:
    """The compiled programs, by lane; see the `lower_…` functions in `programs.py` for what each takes and returns.

    Attributes:
        previews: empty for an engine without previews.
        safety_check: None for a checkpoint without a safety checker.
        empty_bank, fill_bank: None for a worker whose jobs name no LoRAs.
        trace_s, compile_s: seconds that tracing and compiling took.
        cache_hits, cache_misses: programs that came from the persistent compilation cache, and that did not.
    """

    ticks: Mapping[Lane, jax.stages.Compiled]
    snapshots: Mapping[Lane, jax.stages.Compiled]
    restores: Mapping[Lane, jax.stages.Compiled]
    previews: Mapping[Lane, jax.stages.Compiled]
    safety_check: jax.stages.Compiled | None
    empty_bank: jax.stages.Compiled | None
    fill_bank: jax.stages.Compiled | None
    trace_s: float
    compile_s: float
    cache_hits: int
    cache_misses: int


def compile_programs(
    checkpoint: Checkpoint,
    params: Any,
    safety_params: Any | None,
    geometries: Mapping[Lane, Geometry],
    mesh: Mesh,
    with_previews: bool,
    cache: CompileCache | None,
) -> CompiledPrograms:
    """Trace the programs one after the other, then compile them side by side.

    Args:
        checkpoint: the loaded model.
        params: of the checkpoint on the mesh, replicated.
        safety_params: the safety checker's parameters on the mesh, replicated; None without one.
        geometries: the sizes of every lane.
        mesh: the devices.
        with_previews: also compile the programs that make previews.
        cache: the persistent compilation cache, for its counts.

    Raises:
        InvalidCheckpoint: the parameters do not fit the configs.
        ConfigurationError: the compiler finds no room for a program in the devices' memory.
    """
    started = time.monotonic()
    lowered = _lower_lanes(checkpoint, params, geometries, mesh, with_previews)
    if checkpoint.safety_checker is not None:
        checker = checkpoint.safety_checker
        lowered[_SAFETY, None] = lower_safety_check(checker.network, checker.crop, safety_params, mesh)
    geometry = next(iter(geometries.values()))
    if geometry.adapters is not None:
        lowered[_EMPTY_BANK, None] = lower_empty_bank(geometry.adapters, geometry.adapter_entries, mesh)
        lowered[_FILL_BANK, None] = lower_fill_bank(geometry.adapters, geometry.adapter_entries, mesh)
    traced = time.monotonic()
    counts = cache.counts() if cache else (0, 0)
    with ThreadPoolExecutor(len(lowered)) as threads:
        compiled = dict(zip(lowered, threads.map(_compile, lowered.values()), strict=True))
    hits, misses = cache.since(counts) if cache else (0, 0)

    def by_lane(kind: str) -> dict[Lane, jax.stages.Compiled]:
        return {lane: program for (of_kind, lane), program in compiled.items() if of_kind == kind and lane}

    return CompiledPrograms(
        ticks=by_lane(_TICK),
        snapshots=by_lane(_SNAPSHOT),
        restores=by_lane(_RESTORE),
        previews=by_lane(_PREVIEW),
        safety_check=compiled.get((_SAFETY, None)),
        empty_bank=compiled.get((_EMPTY_BANK, None)),
        fill_bank=compiled.get((_FILL_BANK, None)),
        trace_s=traced - started,
        compile_s=time.monotonic() - traced,
        cache_hits=hits,
        cache_misses=misses,
    )


def _compile(program: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return program.compile()
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        first_line = str(exc).strip().split("\n", 1)[0]
        raise ConfigurationError(f"the model does not fit: {first_line}; {WHAT_MAKES_IT_SMALLER}") from exc


def _lower_lanes(
    checkpoint: Checkpoint, params: Any, geometries: Mapping[Lane, Geometry], mesh: Mesh, with_previews: bool
) -> dict[tuple[str, Lane | None], jax.stages.Lowered]:
    """Trace and lower the programs of every lane; return them by kind and lane."""
    lowered: dict[tuple[str, Lane | None], jax.stages.Lowered] = {}
    try:
        for lane, geometry in geometries.items():
            lowered[_TICK, lane] = lower_tick(checkpoint.family, params, geometry, mesh)
            lowered[_SNAPSHOT, lane] = lower_snapshot(geometry, mesh)
            lowered[_RESTORE, lane] = lower_restore(geometry, mesh)
            if with_previews:
                lowered[_PREVIEW, lane] = lower_preview(geometry, mesh)
    except (LookupError, TypeError, ValueError) as exc:
        first_line = str(exc).strip().split("\n", 1)[0]
        raise InvalidCheckpoint(f"{checkpoint.name}: the parameters do not fit the configs: {first_line}") from exc
    return lowered
