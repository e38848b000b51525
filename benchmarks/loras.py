"""What it costs that every job may have LoRAs of its own: a step, an insert and a transfer, with and without.

    python benchmarks/loras.py [--model embedded] [--rank 16] [--slots-per-device 1] [--repeats 9] [--sd15 SIDE]

Needs `pip install -e '.[worker]'`. Compares, in turn and in one run, the ticks of two engines, one without and one
with `sdtpu_loras`, whose jobs name no LoRA, one that lies on the device, and one that has to be sent. A step is the
same program for all of these. `--sd15 32` also runs the UNet of Stable Diffusion 1.5 alone, with parameters of one
value, on latents of this side (64 is 512 pixels; it needs 8 GB of memory). Prints medians in ms and ratios to the
first. About a minute with the shipped checkpoint on two CPU cores, where eight devices are simulated, and one or two
more with `--sd15 32`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker import GenerationRequest
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.diffusion.adapters import AdapterLayout, JobAdapters
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.families.latent_unet import transformer_layers
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.start import choose_dtype
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_unet_config

STEPS = 10
SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots-per-device", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sd15", type=int, metavar="SIDE")
    args = parser.parse_args()
    devices = find_devices("auto", 8)
    dtype = choose_dtype("auto", devices[0].platform)
    with tempfile.TemporaryDirectory() as folder:
        plain, with_loras = (
            Engine(load_checkpoint(args.model, dtype, options), devices, args.slots_per_device)
            for options in (LoadOptions(), LoadOptions(loras=folder, lora_rank=args.rank))
        )
    info = plain.info
    print(f"{info.num_devices} devices of kind {info.device_kind}, {info.slots_per_device} slots each, {info.dtype}")
    measure_engines(plain, with_loras, args.repeats)
    if args.sd15:
        measure_unet(dtype, args.rank, args.sd15, max(3, args.repeats // 3))


def measure_engines(plain: Engine, with_loras: Engine, repeats: int) -> None:
    """Print what an insert, a step and sending a combination of LoRAs cost, with all devices busy."""
    lane, count = plain.info.resolutions[0], plain.info.num_devices
    request = GenerationRequest("a red circle", seed=0, num_inference_steps=1000)
    adapters = with_loras.checkpoint.adapters
    assert adapters is not None
    stack = adapters.layout.zeros(leading=(1,))
    jobs = {engine: engine.prepare("job", request) for engine in (plain, with_loras)}

    def adapted(number: int) -> PreparedJob:
        return replace(jobs[with_loras], adapters=JobAdapters(np.array([1, number], np.uint32), stack))

    def tick(engine: Engine, phase: Phase, job: PreparedJob) -> None:
        engine.execute(Plan(lane, ((phase,),) * count), {"job": job}).wait()

    insert, steps, fresh = Phase(insert=(0, "job")), Phase(steps=STEPS), iter(range(1, 10**6))

    def step_with(job: PreparedJob) -> Callable[[], None]:
        return lambda: tick(with_loras, steps, job)

    print(f"a combination of rank {adapters.layout.rank}: {adapters.layout.entry_bytes / 2**20:.1f} MiB per entry")
    inserts: dict[str, Callable[[], None]] = {
        "without the setting": lambda: tick(plain, insert, jobs[plain]),
        "no LoRA": lambda: tick(with_loras, insert, jobs[with_loras]),
        "a LoRA that is there": lambda: tick(with_loras, insert, adapted(0)),
        "a LoRA that is sent": lambda: tick(with_loras, insert, adapted(next(fresh))),
    }
    _print("insert on every device", _in_turn(inserts, repeats))
    ticks: dict[str, Callable[[], None]] = {
        "without the setting": lambda: tick(plain, steps, jobs[plain]),
        "with LoRAs": step_with(adapted(0)),
    }
    _print(f"{STEPS} steps on every device", _in_turn(ticks, repeats))


def measure_unet(dtype: Any, rank: int, side: int, repeats: int) -> None:
    """Print what a step of Stable Diffusion 1.5's UNet costs: two rows, for the negative prompt and the prompt."""
    unet = networks.unet(read_unet_config(SD15))
    layout = AdapterLayout(rank, dtype, {"unet": transformer_layers(unet)})
    params = {name: jnp.full(shape, 1e-3, dtype) for name, shape in unet.shapes.items()}
    bank = layout.zeros(jnp.ones, (4,))
    print(f"Stable Diffusion 1.5, latents of {side} x {side}: {layout.entry_bytes / 2**20:.1f} MiB per entry")
    x, t = jnp.ones((2, side, side, 4), dtype), jnp.ones(2, jnp.float32)
    context = jnp.ones((2, 77, 768), dtype)

    def predict(params: Any, bank: Any, entries: jax.Array) -> jax.Array:
        adapters = None if bank is None else layout.pick(bank, entries, "unet")
        predicted: jax.Array = unet(params, x, t, context, adapters=adapters)
        return predicted

    entries = jnp.array([1, 1], jnp.int32)
    ways: dict[str, Callable[[], Any]] = {}
    for name, its_bank in (("without the setting", None), ("with LoRAs", bank)):
        program = jax.jit(predict).lower(params, its_bank, entries).compile()
        print(f"  {name:<24}{program.cost_analysis()['flops'] / 1e9:>10.1f} GFLOP")

        def run(program: jax.stages.Compiled = program, its_bank: Any = its_bank) -> None:
            program(params, its_bank, entries).block_until_ready()

        ways[name] = run
    _print("a step", _in_turn(ways, repeats))


def _in_turn(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median ms of each way; they take turns, so that other load on the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(1 + repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if run:  # the first is not counted
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(of_way) for name, of_way in times.items()}


def _print(title: str, medians: Mapping[str, float]) -> None:
    first = next(iter(medians.values()))
    print(title)
    for name, ms in medians.items():
        print(f"  {name:<24}{ms:>10.1f} ms{ms / first:>8.3f}")


if __name__ == "__main__":
    main()
