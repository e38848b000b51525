"""All programs of an engine, loaded or compiled ahead of time: nothing compiles while the engine serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.kept_programs import KeptPrograms, facts_of
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

logger = logging.getLogger(__name__)

TICK, _SNAPSHOT, _RESTORE, _PREVIEW, _SAFETY = "tick", "snapshot", "restore", "preview", "safety check"
_EMPTY_BANK, _FILL_BANK = "empty bank", "fill bank"
_CHECK_EVERY_S = 0.2

Name = tuple[str, Lane | None]
"""What a program does, and its lane if it has one."""


@dataclass(frozen=True)
class CompiledPrograms:
    """The compiled programs, by lane; see the `lower_…` functions in `programs.py` for what each takes and returns.

    Attributes:
        previews: empty for an engine without previews.
        safety_check: None for a checkpoint without a safety checker.
        empty_bank, fill_bank: None for a worker whose jobs name no LoRAs.
        load_s, trace_s, compile_s: seconds that loading kept programs took, and tracing and compiling the others.
        kept: programs that an earlier start kept, which were only loaded.
        cache_hits, cache_misses: of the others, those that came from the persistent compilation cache, and the rest.
    """

    ticks: Mapping[Lane, jax.stages.Compiled]
    snapshots: Mapping[Lane, jax.stages.Compiled]
    restores: Mapping[Lane, jax.stages.Compiled]
    previews: Mapping[Lane, jax.stages.Compiled]
    safety_check: jax.stages.Compiled | None
    empty_bank: jax.stages.Compiled | None
    fill_bank: jax.stages.Compiled | None
    load_s: float
    trace_s: float
    compile_s: float
    kept: int
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
    keep: KeptPrograms | None = None,
    check: Callable[[], None] = lambda: None,
) -> CompiledPrograms:
    """Load the programs that are kept; trace the others one after the other, then compile them side by side.

    Args:
        checkpoint: the model; nothing of its weights is read.
        params: shapes of its parameters on the mesh, replicated.
        safety_params: shapes of the safety checker's parameters on the mesh, replicated; None without one.
        geometries: the sizes of every lane.
        mesh: the devices.
        with_previews: also compile the programs that make previews.
        cache: the persistent compilation cache, for its counts; None without one.
        keep: the programs that are kept, see `kept_programs`; None to compile all of them.
        check: called between programs and while they compile; what it raises is raised at once, and programs whose
            compiling has not begun are not compiled.

    Raises:
        InvalidCheckpoint: the parameters do not fit the configs.
        ConfigurationError: the compiler finds no room for a program in the devices' memory.
    """
    started = time.monotonic()
    lower = all_programs(checkpoint, params, safety_params, geometries, mesh, with_previews)

    def load(name: Name) -> jax.stages.Compiled | None:
        return keep and keep.load(*name, geometry_of(name, geometries))

    def compile_and_keep(name: Name, program: jax.stages.Lowered) -> jax.stages.Compiled:
        compiled = compile_one(program)
        # On CPUs, the copy of a program that is itself read from a cache fails when it runs: it lacks functions.
        if keep is not None and not (cache is not None and cache.was_hit()):
            keep.save(*name, geometry_of(name, geometries), compiled)
        return compiled

    threads = ThreadPoolExecutor(len(lower))
    try:
        kept = {name: program for name, program in zip(lower, threads.map(load, lower), strict=True) if program}
        loaded = time.monotonic()
        lowered = {}
        for name, make in lower.items():
            check()
            if name not in kept:
                lowered[name] = trace_one(make, checkpoint)
        if lowered and keep is not None and (reason := keep.missing()):
            logger.warning(
                "%s; %d programs are compiled here. This worker looks for the fingerprint %s: run sdtpu compile with"
                " its settings and versions", reason, len(lowered), keep.fingerprint,
            )  # fmt: skip
        traced = time.monotonic()
        counts = cache.counts() if cache else (0, 0)
        on_the_way = {name: threads.submit(compile_and_keep, name, program) for name, program in lowered.items()}
        pending = set(on_the_way.values())
        while pending:
            done, pending = wait(pending, _CHECK_EVERY_S, FIRST_EXCEPTION)
            for each in done:
                each.result()
            check()
        compiled = kept | {name: each.result() for name, each in on_the_way.items()}
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # the compiler cannot be interrupted: an error comes first
    hits, misses = cache.since(counts) if cache else (0, 0)

    def by_lane(kind: str) -> dict[Lane, jax.stages.Compiled]:
        return {lane: program for (of_kind, lane), program in compiled.items() if of_kind == kind and lane}

    return CompiledPrograms(
        ticks=by_lane(TICK),
        snapshots=by_lane(_SNAPSHOT),
        restores=by_lane(_RESTORE),
        previews=by_lane(_PREVIEW),
        safety_check=compiled.get((_SAFETY, None)),
        empty_bank=compiled.get((_EMPTY_BANK, None)),
        fill_bank=compiled.get((_FILL_BANK, None)),
        load_s=loaded - started,
        trace_s=traced - loaded,
        compile_s=time.monotonic() - traced,
        kept=len(kept),
        cache_hits=hits,
        cache_misses=misses,
    )


def in_tiles_if_needed(
    compile_all: Callable[[bool], tuple[dict[Lane, Geometry], CompiledPrograms]], vae_tiling: str
) -> tuple[dict[Lane, Geometry], CompiledPrograms]:
    """Return what `compile_all(in_tiles)` makes: with `auto` in tiles only if it does not fit otherwise.

    Raises:
        ConfigurationError: it does not fit.
    """
    if vae_tiling == "auto":
        try:
            return compile_all(False)
        except ConfigurationError as exc:
            if not is_out_of_memory(exc):
                raise
            logger.warning("%s; compiling again, to decode images in tiles (sdtpu_vae_tiling)", exc)
    return compile_all(vae_tiling != "off")


def kept_programs_of(
    checkpoint: Checkpoint, params: Any, mesh: Mesh, folder: Path | None, ahead: Path | None = None
) -> KeptPrograms:
    """Return the programs that are kept for a model and its devices.

    Args:
        checkpoint, params, mesh: as for `compile_programs`.
        folder, ahead: where they lie, as for `KeptPrograms`.
    """
    checker = checkpoint.safety_checker
    others = None if checker is None else (checker.config, checker.crop)
    return KeptPrograms(folder, facts_of(checkpoint.family, params, mesh, others), mesh, ahead)


def geometry_of(name: Name, geometries: Mapping[Lane, Geometry]) -> Geometry:
    """Return the sizes that a program is made for; those of the first lane for one that has none."""
    return geometries[name[1]] if name[1] else next(iter(geometries.values()))


def compile_one(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program.

    Raises:
        ConfigurationError: the compiler finds no room for it in the devices' memory.
    """
    try:
        return program.compile()
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        first_line = str(exc).strip().split("\n", 1)[0]
        raise ConfigurationError(f"the model does not fit: {first_line}; {WHAT_MAKES_IT_SMALLER}") from exc


def all_programs(
    checkpoint: Checkpoint,
    params: Any,
    safety_params: Any | None,
    geometries: Mapping[Lane, Geometry],
    mesh: Mesh,
    with_previews: bool,
) -> dict[Name, Callable[[], jax.stages.Lowered]]:
    """Return by name what traces and lowers each program."""
    lower: dict[Name, Callable[[], jax.stages.Lowered]] = {}
    for lane, geometry in geometries.items():
        lower[TICK, lane] = partial(lower_tick, checkpoint.family, params, geometry, mesh)
        lower[_SNAPSHOT, lane] = partial(lower_snapshot, geometry, mesh)
        lower[_RESTORE, lane] = partial(lower_restore, geometry, mesh)
        if with_previews:
            lower[_PREVIEW, lane] = partial(lower_preview, geometry, mesh)
        if geometry.adapters is not None:
            sizes = geometry.adapters, geometry.adapter_entries
            lower[_EMPTY_BANK, None] = partial(lower_empty_bank, *sizes, mesh)
            lower[_FILL_BANK, None] = partial(lower_fill_bank, *sizes, mesh)
    if checkpoint.safety_checker is not None:
        checker = checkpoint.safety_checker
        lower[_SAFETY, None] = partial(lower_safety_check, checker.network, checker.crop, safety_params, mesh)
    return lower


def trace_one(lower: Callable[[], jax.stages.Lowered], checkpoint: Checkpoint) -> jax.stages.Lowered:
    """Trace and lower a program.

    Raises:
        InvalidCheckpoint: the parameters do not fit the configs.
    """
    try:
        return lower()
    except (LookupError, TypeError, ValueError) as exc:
        first_line = str(exc).strip().split("\n", 1)[0]
        raise InvalidCheckpoint(f"{checkpoint.name}: the parameters do not fit the configs: {first_line}") from exc
