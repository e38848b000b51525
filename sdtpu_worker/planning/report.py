"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdtpu_worker.planning.chips import GIB
from sdtpu_worker.planning.compile_ahead import slots_per_device


def to_text(plan: Mapping[str, Any]) -> str:
    """Return what a person reads; every figure says whether it is compiled, arithmetic or simulated."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    chip, (height, width) = plan["chip"], plan["resolution"]
    yield (
        f"{plan['model']} at {height}x{width} on {plan['topology']}: {plan['chips_per_host']} chips with"
        f" {chip['hbm_bytes'] / GIB:.2f} GiB, {chip['tflops']:g} TFLOP/s, {chip['hbm_gb_per_s']:g} GB/s;"
        f" {plan['guidance_rows']} rows per job, {plan['dtype']}"
    )
    yield f"planned for {'; '.join(_planned_for(plan['planned_for']))}"
    yield f"jax {plan['versions']['jax']}, libtpu {plan['versions']['libtpu']}; nothing ran on a TPU"
    for setting in plan["settings"]:
        if setting.get("programs"):
            yield ""
            yield from _programs(setting)
    yield ""
    yield from _table(plan)
    yield ""
    best = plan["best_slots_per_device"]
    yield (
        "No compiled setting fits the chip's memory."
        if best is None
        else f"Best compiled setting for {_steps(plan['steps'])}: {slots_per_device(best)}."
    )
    if plan["load"]:
        yield from _load(plan["load"])
    yield from _legend(plan)


def _planned_for(planned: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the worker is to serve, with the source of what is not the default."""

    def said(name: str, words: str) -> str:
        source = planned["sources"].get(name, "default")
        return words if source == "default" else f"{words} ({source})"

    windows, nets, rank = planned["prompt_windows"], planned["controlnets"], planned["lora_rank"]
    yield said("prompt_windows", f"prompts of up to {windows} windows" if windows > 1 else "prompts of one window")
    yield said("image_inputs", "pictures as input" if planned["image_inputs"] else "no pictures as input")
    listed = ", ".join(f"{name}: {folder}" for name, folder in nets.items())
    yield said("controlnets", f"{_count(len(nets), 'ControlNet')} ({listed})" if nets else "no ControlNets")
    yield said("lora_rank", f"LoRAs of jobs up to rank {rank}" if rank else "no LoRAs of jobs")
    yield said("previews", "previews" if planned["previews"] else "no previews")
    for name in ("guidance", "attention", "vae_tiling"):
        if planned[name] != "auto":
            yield said(name, f"{name} {planned[name]}")
    if others := planned["other_resolutions"]:
        sizes = ", ".join(f"{height}x{width}" for height, width in others)
        yield f"the largest of its resolutions; slots and programs of {sizes} come on top"


def _programs(setting: Mapping[str, Any]) -> Iterator[str]:
    memory = setting["memory"]
    yield f"{slots_per_device(setting['slots_per_device'])}, compiled: {_fits(setting)}"
    yield (
        f"  memory: arguments {_gib(memory['argument_bytes'])}, temporaries {_gib(memory['temp_bytes'])}, code"
        f" {_gib(memory['code_bytes'])}, at the peak {_gib(memory['total_bytes'])}"
    )
    yield (
        f"  collectives: {setting['collectives']}; state buffers in place: {setting['aliased_buffers']} of"
        f" {setting['state_buffers']}"
    )
    yield (
        f"  {'':<10}{'GFLOP':>10}{'padded':>10}{'HBM, GB':>10}{'Mcycles':>10}{'of kernels':>12}{'kernels':>9}{'ms':>10}"
        "  limited by"
    )
    for name in ("step", "windows", "control", "insert", "picture", "decode"):
        if (part := setting[name]) is None:
            continue
        cycles, of_kernels = (
            "-" if part[which] is None else f"{part[which] / 1e6:.2f}" for which in ("cycles", "kernel_cycles")
        )
        yield (
            f"  {name:<10}{part['gflops']:>10.1f}{part['padded_gflops']:>10.1f}{part['hbm_gb']:>10.3f}"
            f"{cycles:>10}{of_kernels:>12}{part['kernels']:>9}{part['ms']:>10.2f}  {part['limit']}"
        )
    for name, program in setting["programs"].items():
        if name != "tick":
            yield (
                f"  {name}: arguments {_gib(program['argument_bytes'])}, temporaries {_gib(program['temp_bytes'])},"
                f" HBM {program['parts']['all']['hbm_bytes'] / 1e9:.4f} GB, collectives"
                f" {sum(program['collectives'].values())}"
            )


def _table(plan: Mapping[str, Any]) -> Iterator[str]:
    steps = ("4", "20", "30", "50")
    yield (
        f"{'slots':>5}  {'kind':<11}{'fits':<6}{'GB/image-step':>14}{'ms/image-step':>14}{'steps/s':>9}"
        + "".join(f"{f'{n} steps':>18}" for n in steps)
    )
    for setting in plan["settings"]:
        if "latency_s" not in setting:
            yield f"{setting['slots_per_device']:>5}  {setting['kind']:<11}no"
            continue
        figures = (f"{setting['latency_s'][n]:.2f} s {setting['images_per_s'][n]:.1f}/s" for n in steps)
        yield (
            f"{setting['slots_per_device']:>5}  {setting['kind']:<11}{'yes' if setting['fits'] else 'no':<6}"
            f"{setting['hbm_gb_per_image_step']:>14.3f}{setting['estimated_ms_per_image_step']:>14.2f}"
            f"{setting['image_steps_per_s']:>9.0f}" + "".join(f"{each:>18}" for each in figures)
        )


def _load(load: Mapping[str, Any]) -> Iterator[str]:
    hosts, chips = _count(load["hosts"], "host"), _count(load["chips"], "chip")
    yield (
        f"Load, simulated: {load['jobs_per_hour']:g} jobs per hour of {_steps(load['steps'])} need {hosts} ({chips}):"
        f" 99 of 100 jobs within {load['p99_s']:.2f} s (wanted: {load['p99_limit_s']:g} s), mean {load['mean_s']:.2f}"
        f" s, {load['utilisation']:.0%} of what the hosts can do."
    )
    if load["cost_per_hour"] is not None:
        yield f"Cost: {load['cost_per_hour']:g} per hour, {load['cost_per_1000_images']:g} for 1,000 images."


def _legend(plan: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "parts:      step, insert and decode are of jobs without pictures, ControlNets and long prompts. On top come"
    yield "            windows, for a step while all prompts have all the windows that they may have; control, for a"
    yield "            step while all ControlNets are asked; picture, for an insert with pictures."
    yield "compiled:   memory, traffic, collectives and buffers, read from the program that the compiler made."
    yield "arithmetic: FLOPs, and times that cycles do not limit: the larger of FLOPs as the matrix unit pads them over"
    yield "            its peak and HBM traffic over its bandwidth, a lower bound. Rows of this kind are scaled from"
    yield "            the nearest compiled one."
    if plan["answer"] == "full":
        yield "cycles:     the compiler's own estimate of its operations, and after them those of Pallas kernels: their"
        yield "            instruction bundles, or what the matrix unit takes for them, whichever is more."
    else:
        yield "            With --full the compiler's own estimate of cycles counts too."


def _fits(setting: Mapping[str, Any]) -> str:
    if setting["fits"]:
        return "fits, with images decoded in tiles" if setting["in_tiles"] else "fits"
    return f"DOES NOT FIT{': ' + setting['reason'] if setting['reason'] else ''}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _steps(steps: Any) -> str:
    return f"{', '.join(map(str, steps))} steps"
