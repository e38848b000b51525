"""From what was compiled to times: arithmetic with a chip's figures, for compiled and for other slot counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.planning.chips import Chip

SLOT_COUNTS = (1, 2, 4, 8)
STEP_COUNTS = (4, 20, 30, 50)
_NO_GAIN = 1.01
"""A setting with more slots must make this many times the images to be the better one: its jobs take longer."""


@dataclass(frozen=True)
class PartEstimate:
    """What one step, insert or decode takes on a device.

    Attributes:
        flops: of its matrix multiplications and convolutions.
        padded_flops: likewise, as the matrix unit does them.
        hbm_bytes: that it moves.
        cycles: that the compiler estimates for its own operations; 0 before code is generated.
        kernel_cycles: of the Pallas kernels, from their instructions; 0 before code is generated.
        kernels: how many Pallas kernels run in it.
        seconds: the largest of what these take.
        limit: which of them: `padded FLOPs`, `HBM traffic` or `cycles`.
    """

    flops: int
    padded_flops: int
    hbm_bytes: int
    cycles: int
    kernel_cycles: int
    kernels: int
    seconds: float
    limit: str


@dataclass(frozen=True)
class Estimate:
    """What a setting costs on a device.

    Attributes:
        slots: of the device.
        kind: `compiled`, or `arithmetic` for one that was scaled from a compiled one.
        num_devices: of a host.
        fits: the programs and all that lies beside them have room.
        reason: why not, in the compiler's words; None otherwise.
        argument_bytes, temp_bytes, code_bytes: of the tick; None where it is not known.
        total_bytes: of all.
        step, insert, decode: their work, for jobs without pictures, ControlNets and long prompts.
        picture: what an insert does besides for a job with pictures.
        windows: what a step does besides while all prompts have all the windows that they may have; None for a worker
            whose prompts have one.
        control: what a step does besides for jobs that ask all ControlNets; None for a worker without any.
    """

    slots: int
    kind: str
    num_devices: int
    fits: bool
    reason: str | None
    argument_bytes: int
    temp_bytes: int | None
    code_bytes: int | None
    total_bytes: int | None
    step: PartEstimate
    insert: PartEstimate
    decode: PartEstimate
    picture: PartEstimate
    windows: PartEstimate | None = None
    control: PartEstimate | None = None

    @property
    def hbm_gb_per_image_step(self) -> float:
        """Gigabytes (10^9) of HBM traffic for one denoising step of one image."""
        return self.step.hbm_bytes / self.slots / 1e9

    @property
    def ms_per_image_step(self) -> float:
        """Milliseconds of a device for one denoising step of one image."""
        return 1e3 * self.step.seconds / self.slots

    @property
    def cost(self) -> Cost:
        """As the policy and the simulator have it."""
        return Cost(self.step.seconds, self.insert.seconds, self.decode.seconds, self.picture.seconds)

    def latency_s(self, steps: int) -> float:
        """Return how long a job takes that finds a slot free, without its neighbours' inserts and decodes."""
        return steps * self.step.seconds + self.insert.seconds + self.decode.seconds

    def images_per_s(self, steps: int) -> float:
        """Return the images per second of a host whose slots are always full."""
        others = self.slots * (self.insert.seconds + self.decode.seconds)
        return self.num_devices * self.slots / (steps * self.step.seconds + others)


def estimate(facts: Mapping[str, Any], slots: int, chip: Chip) -> Estimate | None:
    """Return the estimate of a compiled setting; None if the compiler found no room before it had a program.

    Args:
        facts: of `compile_ahead`.
        slots: that were compiled.
        chip: the target.
    """
    tick = facts["programs"].get("tick")
    if tick is None:
        return None
    parts = {
        name: _part(facts, name, 1.0, 0, chip)
        for name in ("step", "insert", "decode", "picture", *_further_parts(facts))
    }
    total = tick["total_bytes"]
    if total is not None:
        total += facts["bank_bytes"] and facts["entry_bytes"]  # the entry that is sent; the bank is an argument
        total += sum(program["code_bytes"] or 0 for program in facts["programs"].values())
    return Estimate(
        slots=slots,
        kind="compiled",
        num_devices=facts["num_devices"],
        fits=facts["fits"] and (total is None or total <= chip.hbm_bytes),
        reason=facts["reason"],
        argument_bytes=tick["argument_bytes"],
        temp_bytes=tick["temp_bytes"],
        code_bytes=tick["code_bytes"],
        total_bytes=total,
        **parts,
    )


def scale(facts: Mapping[str, Any], compiled: Estimate, slots: int, chip: Chip) -> Estimate:
    """Return the estimate of another slot count, by arithmetic.

    Of a step's traffic the UNet's weights stay as they are and the rest grows with the slots; so does the working
    memory.
    Inserts and decodes are of one job, whatever the slots.
    """
    times = slots / compiled.slots
    step = _part(facts, "step", times, facts["unet_bytes"], chip)
    grown = int(facts["slot_bytes"] * (times - 1))
    temp = None if compiled.temp_bytes is None else int(compiled.temp_bytes * max(times, 0))
    total = None
    if compiled.total_bytes is not None and temp is not None and compiled.temp_bytes is not None:
        total = compiled.total_bytes + grown + temp - compiled.temp_bytes
    return Estimate(
        slots=slots,
        kind="arithmetic",
        num_devices=compiled.num_devices,
        fits=total is None or total <= chip.hbm_bytes,
        reason=None,
        argument_bytes=compiled.argument_bytes + grown,
        temp_bytes=temp,
        code_bytes=compiled.code_bytes,
        total_bytes=total,
        step=step,
        insert=compiled.insert,
        decode=compiled.decode,
        picture=compiled.picture,
        **{name: _part(facts, name, times, fixed_bytes, chip) for name, fixed_bytes in _further_parts(facts).items()},
    )


def _further_parts(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the parts of a step that only some jobs ask for, each with the bytes of weights that it reads once."""
    windows = {"windows": 0} if facts["prompt_windows"] > 1 else {}
    return windows | ({"control": facts["controlnet_bytes"]} if facts["controlnets"] else {})


def best(estimates: Sequence[Estimate], steps: int) -> Estimate | None:
    """Return the setting that makes the most images of that many steps; of those that make about as many, the smallest.

    Returns:
        None if none fits.
    """
    found: Estimate | None = None
    for each in sorted(estimates, key=lambda one: one.slots):
        if each.fits and (found is None or each.images_per_s(steps) > _NO_GAIN * found.images_per_s(steps)):
            found = each
    return found


def _part(facts: Mapping[str, Any], name: str, times: float, weights: int, chip: Chip) -> PartEstimate:
    work = facts["programs"]["tick"]["parts"][name]
    flops = int(times * sum(2 * m * k * n * count for m, k, n, count in facts["matmuls"][name]))
    on_chip = facts["matmuls_on_chip"][name]
    padded = int(times * sum(chip.padded_flops(m, k, n) * count for m, k, n, count in on_chip))
    fixed = min(weights, work["hbm_bytes"])
    traffic = int(fixed + times * (work["hbm_bytes"] - fixed))
    cycles, kernel_cycles = int(times * work["cycles"]), int(times * work["kernel_cycles"])
    seconds = {
        "padded FLOPs": padded / chip.flops,
        "HBM traffic": traffic / chip.hbm_bytes_per_s,
        "cycles": (cycles + kernel_cycles) / chip.clock_hz,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return PartEstimate(flops, padded, traffic, cycles, kernel_cycles, work["kernels"], seconds[limit], limit)
