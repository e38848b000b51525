"""`sdtpu plan` without its command line: compile what is not known yet, estimate, simulate, and answer with JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from sdtpu_worker.planning.chips import Chip, Topology, parse_topology
from sdtpu_worker.planning.compile_ahead import Limits, Wanted, check_installed, compile_ahead, slots_per_device
from sdtpu_worker.planning.estimates import SLOT_COUNTS, STEP_COUNTS, Estimate, PartEstimate, best, estimate, scale
from sdtpu_worker.planning.load import hosts_for_load
from sdtpu_worker.planning.results_cache import ResultsCache, fingerprint
from sdtpu_worker.planning.settings import USUAL, Planned


@dataclass(frozen=True)
class LoadWanted:
    """A load to serve; see `load.hosts_for_load`."""

    jobs_per_hour: float
    p99_s: float


def make_plan(
    planned: Planned,
    steps: Sequence[int],
    load: LoadWanted | None,
    price: float | None,
    limits: Limits,
    cache: ResultsCache,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the whole answer; docs/reference/plan.md tells what each name means.

    Args:
        planned: what to compile; of the slot counts those of `SLOT_COUNTS` that are not compiled are scaled from the
            nearest one that is.
        steps: numbers of denoising steps of the jobs, for the best setting and the load.
        load: also find the hosts for it.
        price: of a chip for an hour.
        limits: of each compile.
        cache: of what was compiled before.
        say: called with a line of progress.

    Raises:
        ConfigurationError: an option is wrong.
        PlanFailed: nothing could be compiled.
    """
    topology = parse_topology(planned.wanted.topology)
    wanted, slots = replace(planned.wanted, topology=topology.name), planned.slots
    check_installed()

    def compile_(wanted: Wanted) -> dict[str, Any]:
        return _compile(wanted, limits, cache, say)

    found = {count: _in_tiles_if_needed(replace(wanted, slots=count), topology, compile_, say) for count in slots}
    facts = next(iter(found.values()))
    device = _device(topology, facts)
    compiled = {count: each for count, facts in found.items() if (each := estimate(facts, count, device))}
    estimates = dict(compiled)
    if compiled:
        for count in SLOT_COUNTS:
            if count not in found:
                nearest = min(compiled, key=lambda one: abs(one - count))
                estimates[count] = scale(found[nearest], compiled[nearest], count, device)
    mean_steps = round(sum(steps) / len(steps))
    chosen = best([each for each in estimates.values() if each.slots in compiled], mean_steps)
    chip = topology.chip
    return {
        "model": wanted.model,
        "topology": topology.name,
        "chips_per_host": topology.num_chips,
        "chip": {
            "name": chip.name,
            "hbm_bytes": chip.hbm_bytes,
            "tflops": chip.flops / 1e12,
            "hbm_gb_per_s": chip.hbm_bytes_per_s / 1e9,
            "lanes": chip.lanes,
        },
        "resolution": facts["resolution"],
        "guidance_rows": facts["rows_per_job"],
        "lora_rank": wanted.lora_rank,
        "dtype": wanted.dtype,
        "planned_for": _planned_for(planned, facts),
        "answer": "full" if all(each["code_generated"] for each in found.values()) else "quick",
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "steps": list(steps),
        "settings": [
            _setting(estimates[count], found.get(count)) if count in estimates else _no_room(count, found[count])
            for count in sorted({*estimates, *found})
        ],
        "best_slots_per_device": chosen.slots if chosen else None,
        "load": hosts_for_load(chosen, load.jobs_per_hour, steps, load.p99_s, topology.num_chips, price)
        if load and chosen
        else None,
    }


def _planned_for(planned: Planned, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the worker that is planned for, and who said each."""
    wanted = planned.wanted
    return {
        "guidance": wanted.guidance,
        "prompt_windows": wanted.prompt_windows,
        "image_inputs": wanted.image_inputs,
        "controlnets": {name: folder or USUAL for name, folder in wanted.controlnets},
        "lora_rank": wanted.lora_rank,
        "previews": wanted.previews,
        "attention": wanted.attention,
        "vae_tiling": wanted.vae_tiling,
        "dtype": wanted.dtype,
        "resolution": facts["resolution"],
        "other_resolutions": [list(size) for size in planned.other_resolutions],
        "sources": dict(planned.sources),
    }


def _device(topology: Topology, facts: Mapping[str, Any]) -> Chip:
    """Return what the compiler describes as one device: a chip, or a part of it."""
    return topology.chip.share(topology.num_chips / facts["num_devices"])


def _in_tiles_if_needed(
    wanted: Wanted, topology: Topology, compile_: Callable[[Wanted], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    """Compile as a worker with `sdtpu_vae_tiling = auto`: with images decoded in tiles only if it does not fit else."""
    facts = compile_(wanted)
    found = estimate(facts, wanted.slots, _device(topology, facts))
    if wanted.vae_tiling != "auto" or (found is not None and found.fits):
        return facts
    say(f"{wanted.model}, {slots_per_device(wanted.slots)}: does not fit; once more with images decoded in tiles")
    return compile_(replace(wanted, vae_tiling="on"))


def _compile(wanted: Wanted, limits: Limits, cache: ResultsCache, say: Callable[[str], None]) -> dict[str, Any]:
    key = fingerprint(wanted, limits.full)
    facts = cache.read(key)
    if facts is not None:
        say(f"{wanted.model}, {slots_per_device(wanted.slots)}: compiled before")
        return facts
    facts = compile_ahead(wanted, limits, say)
    if facts["time_limit_passed"]:
        say(
            f"{wanted.model}, {slots_per_device(wanted.slots)}: the {limits.time_s:g} s of --time-limit passed, so this"
            " is of what the compiler had done by then; give it more"
        )
    else:
        cache.write(key, facts)
    return facts


def _setting(each: Estimate, facts: dict[str, Any] | None) -> dict[str, Any]:
    programs = facts["programs"] if facts else None
    has_cycles = each.step.cycles > 0
    return {
        "slots_per_device": each.slots,
        "kind": each.kind,
        "fits": each.fits,
        "reason": each.reason,
        "in_tiles": facts["in_tiles"] if facts else None,
        "memory": {
            "argument_bytes": each.argument_bytes,
            "temp_bytes": each.temp_bytes,
            "code_bytes": each.code_bytes,
            "total_bytes": each.total_bytes,
        },
        "collectives": sum(sum(one["collectives"].values()) for one in programs.values()) if programs else None,
        "state_buffers": facts["donated"] if facts else None,
        "aliased_buffers": programs["tick"]["aliased"] if programs else None,
        "programs": programs,
        "hbm_gb_per_image_step": round(each.hbm_gb_per_image_step, 4),
        "gflops_per_image_step": round(each.step.flops / each.slots / 1e9, 2),
        "padded_gflops_per_image_step": round(each.step.padded_flops / each.slots / 1e9, 2),
        "estimated_ms_per_image_step": round(each.ms_per_image_step, 3),
        "estimate": "compiled" if each.step.limit == "cycles" else "arithmetic",
        "limit": each.step.limit,
        "kernels": each.step.kernels,
        "step": _part(each.step, has_cycles),
        "insert": _part(each.insert, has_cycles),
        "decode": _part(each.decode, has_cycles),
        "picture": _part(each.picture, has_cycles),
        "windows": each.windows and _part(each.windows, has_cycles),
        "control": each.control and _part(each.control, has_cycles),
        "image_steps_per_s": round(each.num_devices * each.slots / each.step.seconds, 2),
        "latency_s": {str(steps): round(each.latency_s(steps), 4) for steps in STEP_COUNTS},
        "images_per_s": {str(steps): round(each.images_per_s(steps), 3) for steps in STEP_COUNTS},
    }


def _part(part: PartEstimate, has_cycles: bool) -> dict[str, Any]:
    return {
        "ms": round(1e3 * part.seconds, 4),
        "limit": part.limit,
        "gflops": round(part.flops / 1e9, 3),
        "padded_gflops": round(part.padded_flops / 1e9, 3),
        "hbm_gb": round(part.hbm_bytes / 1e9, 5),
        "cycles": part.cycles if has_cycles else None,
        "kernel_cycles": part.kernel_cycles if has_cycles else None,
        "kernels": part.kernels,
    }


def _no_room(slots: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {"slots_per_device": slots, "kind": "compiled", "fits": False, "reason": facts["reason"]}
