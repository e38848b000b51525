"""`sdtpu plan` without its command line: compile what is not known yet, estimate, simulate, and answer with JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from sdtpu_worker.planning.chips import parse_topology
from sdtpu_worker.planning.compile_ahead import Limits, Wanted, check_installed, compile_ahead
from sdtpu_worker.planning.estimates import SLOT_COUNTS, STEP_COUNTS, Estimate, PartEstimate, best, estimate, scale
from sdtpu_worker.planning.load import hosts_for_load
from sdtpu_worker.planning.results_cache import ResultsCache, fingerprint


@dataclass(frozen=True)
class LoadWanted:
    """A load to serve; see `load.hosts_for_load`."""

    jobs_per_hour: float
    p99_s: float


def make_plan(
    wanted: Wanted,
    slots: Sequence[int],
    steps: Sequence[int],
    load: LoadWanted | None,
    price: float | None,
    limits: Limits,
    cache: ResultsCache,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the whole answer; docs/reference/plan.md tells what each name means.

    Args:
        wanted: what to compile, whatever its slots.
        slots: the slot counts to compile; the others of `SLOT_COUNTS` are scaled from the nearest of them.
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
    topology = parse_topology(wanted.topology)
    wanted = replace(wanted, topology=topology.name)
    check_installed()
    found = {count: _compile(replace(wanted, slots=count), limits, cache, say) for count in slots}
    facts = next(iter(found.values()))
    device = topology.chip.share(topology.num_chips / facts["num_devices"])
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
        "dtype": "bfloat16",
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


def _compile(wanted: Wanted, limits: Limits, cache: ResultsCache, say: Callable[[str], None]) -> dict[str, Any]:
    key = fingerprint(wanted, limits.full)
    facts = cache.read(key)
    if facts is not None:
        say(f"{wanted.model}, {wanted.slots} slots per device: compiled before")
        return facts
    facts = compile_ahead(wanted, limits, say)
    if not facts["time_limit_passed"]:
        cache.write(key, facts)
    return facts


def _setting(each: Estimate, facts: dict[str, Any] | None) -> dict[str, Any]:
    programs = facts["programs"] if facts else None
    return {
        "slots_per_device": each.slots,
        "kind": each.kind,
        "fits": each.fits,
        "reason": each.reason,
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
        "step": _part(each.step),
        "insert": _part(each.insert),
        "decode": _part(each.decode),
        "picture": _part(each.picture),
        "image_steps_per_s": round(each.num_devices * each.slots / each.step.seconds, 2),
        "latency_s": {str(steps): round(each.latency_s(steps), 4) for steps in STEP_COUNTS},
        "images_per_s": {str(steps): round(each.images_per_s(steps), 3) for steps in STEP_COUNTS},
    }


def _part(part: PartEstimate) -> dict[str, Any]:
    return {
        "ms": round(1e3 * part.seconds, 4),
        "limit": part.limit,
        "gflops": round(part.flops / 1e9, 3),
        "padded_gflops": round(part.padded_flops / 1e9, 3),
        "hbm_gb": round(part.hbm_bytes / 1e9, 5),
        "cycles": part.cycles or None,
        "kernels": part.kernels,
    }


def _no_room(slots: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {"slots_per_device": slots, "kind": "compiled", "fits": False, "reason": facts["reason"]}
