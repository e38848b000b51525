"""The host's work for a tick of a large model: 8 devices with 8 slots each, and as many parameters as SDXL has.

    python benchmarks/dispatch.py [--devices 8] [--slots-per-device 8] [--leaves 2641] [--jobs 256] [--step-ms 760]

Needs `pip install -e '.[worker]'`; a few minutes on two CPU cores, most of it compiling. A stand-in with as many
parameters as Stable Diffusion XL (2,641 arrays), each of a few bytes and each of use, is served by the real device
loop, policy and engine on simulated devices; every slot is busy. Prints medians per tick in milliseconds of a CPU, of
the threads that do the host's work (the device loop's, and the one that waits for ticks): what the simulated devices
compute, in threads of their own, does not count. The parts are shares of the loop's thread. `--step-ms` is what the
policy is told of a step: with what eight slots of SDXL take on a v5e by `sdtpu plan`'s estimate a tick has one step,
and some jobs begin and end in each; with less it has more steps, and more jobs begin and end in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.diffusion.adapters import Layers
from sdtpu_worker.diffusion.checkpoint import Checkpoint, Defaults
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.engine_io import Calibration, Tick
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.diffusion.sharding import find_devices

SIDE, STEPS, TICK_S = 64, 20, 0.1
SDXL = {"text_encoder": 196, "text_encoder_2": 517, "unet": 1680, "vae": 248}
"""How many parameters each part of Stable Diffusion XL has."""
SCHEDULE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
            "prediction_type": "epsilon"}  # fmt: skip


class StandIn:
    """A model of which every parameter adds a little, with the inputs and the state of Stable Diffusion XL."""

    rows, follows_guidance_scale, picture_use, control_names = 2, True, PictureUse.START, ()
    adapter_layers: ClassVar[Layers] = {}
    latent_channels, scale_factor, size_multiple, default_size = 4, 8, 8, (SIDE, SIDE)

    def input_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        ids, weights = (jax.ShapeDtypeStruct((2, 1, 77), dtype) for dtype in (jnp.int32, jnp.float32))
        return {"prompt_ids": ids, "prompt_ids_2": ids, "prompt_weights": weights, "prompt_weights_2": weights,
                "clip_skip": jax.ShapeDtypeStruct((2,), jnp.int32), "counts": jax.ShapeDtypeStruct((2,), bool),
                "time_ids": jax.ShapeDtypeStruct((6,), jnp.float32)}  # fmt: skip

    def make_inputs(self, request: GenerationRequest, size: Any) -> tuple[dict[str, np.ndarray], bool]:
        return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in self.input_shapes().items()}, False

    def conditioning_shapes(self, size: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {"context": jax.ShapeDtypeStruct((77, 2), jnp.float32), "added": jax.ShapeDtypeStruct((8,), jnp.float32)}

    def encode(self, params: Any, inputs: Any, pictures: Any, adapters: Any = None) -> dict[str, jax.Array]:
        number = _sum(params["text_encoder"]) + _sum(params["text_encoder_2"]) + inputs["time_ids"].sum()
        return {"context": jnp.full((2, 77, 2), number), "added": jnp.full((2, 8), number)}

    def encode_image(self, params: Any, image: jax.Array, noise: jax.Array) -> jax.Array:
        return noise

    def control_shapes(self, size: Any) -> tuple[()]:
        return ()

    def embed_control(self, params: Any, number: int, picture: jax.Array) -> jax.Array:
        raise NotImplementedError("it has no ControlNets")

    def control(self, *_: Any) -> Any:
        raise NotImplementedError("it has no ControlNets")

    def predict(self, params: Any, latents: Any, timesteps: Any, conditioning: Any, added: Any, adapters: Any = None):  # type: ignore[no-untyped-def]  # as in the protocol
        return latents + _sum(params["unet"]) + conditioning["added"].sum()

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        image = jnp.repeat(jnp.repeat(latents[:3].transpose(1, 2, 0), 8, 0), 8, 1)
        return jnp.tanh(image + _sum(params["vae"]))

    def facts(self) -> dict[str, str]:
        return {"family": "stand-in"}


def _sum(params: Mapping[str, jax.Array]) -> jax.Array:
    total = jnp.float32(0)
    for value in params.values():
        total += value[0]
    return total


def stand_in(leaves: int) -> Checkpoint:
    """Return a checkpoint of the stand-in with so many parameters, shared out as those of Stable Diffusion XL are."""
    whole = sum(SDXL.values())
    params = {
        part: {f"{i}.weight": np.full(4, 1e-9, np.float32) for i in range(max(1, count * leaves // whole))}
        for part, count in SDXL.items()
    }
    schedule = NoiseSchedule.from_config(SCHEDULE)
    return Checkpoint("stand-in", jnp.float32, StandIn(), params, schedule, Defaults("ddim", 50, 1.0), None)


class Meter:
    """Milliseconds of a CPU by part of the host's work, each for itself without the parts in it."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Have every call of a method counted."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.ms[part].append(1000 * (time.thread_time() - started))

        setattr(owner, name, timed)


def measure(engine: Engine, num_jobs: int, step_s: float) -> dict[str, float]:
    """Serve jobs that keep every slot busy, and return medians per tick."""
    (lane,) = engine.info.resolutions
    engine.adopt(
        Calibration({lane: TickCosts(engine.info.num_devices, Cost(step_s, 0.1 * step_s, 0.2 * step_s))}, {}, {})
    )
    policy = Aggregator(engine.costs, engine.info.slots_per_device, engine.info.phases_per_tick, TICK_S, False, 0)
    meter, ends = Meter(), []
    meter.wrap(policy, "plan", "policy")
    meter.wrap(policy, "update", "policy, results")
    meter.wrap(engine._instructions[lane], "make", "instructions")
    meter.wrap(engine, "execute", "execute")
    loop = DeviceLoop(engine, policy, on_death=lambda: None)
    meter.wrap(loop, "_execute", "dispatch, whole")
    meter.wrap(loop, "_complete", "results")
    meter.wrap(loop, "_take_in", "taking in, with results")
    wait = Tick.wait
    waiting: list[float] = []

    def timed_wait(tick: Tick) -> Any:
        started = time.thread_time()
        images = wait(tick)
        waiting.append(1000 * (time.thread_time() - started))
        return images

    plan: Callable[..., Any] = policy.plan

    def marked_plan(*args: Any) -> Any:
        ends.append(time.thread_time())
        return plan(*args)

    policy.plan = marked_plan  # type: ignore[method-assign,assignment]  # it counts what the whole thread took from tick to tick
    Tick.wait = timed_wait  # type: ignore[method-assign,assignment]  # likewise
    jobs = [
        engine.prepare(str(i), GenerationRequest("x", seed=i, num_inference_steps=STEPS, sampler="ddim"))
        for i in range(num_jobs)
    ]
    left, ended = iter(jobs), threading.Semaphore(0)

    def submit(done: Any = None) -> None:
        if (job := next(left, None)) is not None:
            loop.submit(job).future.add_done_callback(lambda _: ended.release())

    loop.start()
    try:
        for _ in range(2 * engine.info.num_slots):  # as many as a worker claims
            submit()
        for _ in jobs:
            assert ended.acquire(timeout=600)
            submit()
    finally:
        loop.close()
        Tick.wait = wait  # type: ignore[method-assign]
    ticks = loop.stats.ticks
    of_loop = [1000 * (after - before) for before, after in itertools.pairwise(ends)]
    parts = {part: statistics.median(each) for part, each in meter.ms.items()}
    parts["instructions and program"] = parts.pop("execute")
    total = statistics.median(of_loop)
    return {"ticks": ticks, **parts, "loop's thread": total, "waiting thread": statistics.median(waiting),
            "host, per tick": total + statistics.median(waiting)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--slots-per-device", type=int, default=8)
    parser.add_argument("--leaves", type=int, default=sum(SDXL.values()))
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=760, help="of 8 slots, as the policy is told (760)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = Engine(stand_in(args.leaves), find_devices("cpu", args.devices), args.slots_per_device)
    leaves = len(jax.tree.leaves(engine.params))
    print(f"{args.devices} simulated devices, {args.slots_per_device} slots each, {leaves} parameters")
    found = measure(engine, args.jobs, args.step_ms / 1000)
    for part, value in found.items():
        print(f"{part:<28}{value:>9.2f}" + ("" if part == "ticks" else " ms"))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
