"""Stable Diffusion in JAX on all devices, step by step, on our engine and without Celery.

    python examples/walkthrough.py [--out walkthrough] [--model embedded]

Needs `pip install -e '.[worker]'`. On a host with TPUs it uses them; elsewhere it simulates eight devices. With the
shipped checkpoint on two CPU cores it takes about two minutes and writes five picture grids to `--out`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sdtpu_worker import GenerationRequest, image_grid
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import find_devices

Answer = TypeVar("Answer")
PROMPT = "a yellow star on a blue background"
PROMPTS = [
    "a red circle on a blue background",
    "a white heart on a purple background",
    "a green triangle on a yellow background",
    "an orange ring on a black background",
    "a large blue square on a white background",
    "a small black star on an orange background",
    "a purple circle on the left of a white background",
    "a yellow heart at the top of a green background",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("walkthrough"), help="folder for the grids")
    parser.add_argument("--model", default="embedded", help="a folder or a hub name in the diffusers layout")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # 1. Which devices are there?
    devices = find_devices("auto", cpu_devices=8)
    count = len(devices)
    print(f"1. {count} devices of kind {devices[0].device_kind}")

    # 2. A checkpoint in bfloat16. Its family has no state: the parameters are arrays by name beside it.
    checkpoint = load_checkpoint(args.model, jnp.bfloat16)
    leaves = jax.tree.leaves(checkpoint.params)
    print(f"2. {type(checkpoint.family).__name__}: {sum(leaf.size for leaf in leaves):,} parameters, "
          f"{leaves[0].dtype}, in {len(leaves)} arrays")  # fmt: skip

    # 3. The engine: parameters replicated on every device, one program compiled ahead of time, one slot per device.
    engine, compile_s = timed(lambda: Engine(checkpoint, devices))
    kernel = engine.params["unet"]["conv_in.weight"]
    print(f"3. engine ready in {compile_s:.1f} s, of which {engine.info.compile_s:.1f} s compiling; "
          f"conv_in {kernel.shape} is on {len(kernel.sharding.device_set)} devices, "
          f"{'whole on each' if kernel.is_fully_replicated else 'split'}")  # fmt: skip

    # 4. A prompt becomes 77 token ids, and so does its negative prompt, which comes first.
    ids = engine.prepare("a job", GenerationRequest(PROMPT, seed=0)).inputs["prompt_ids"]
    print(f"4. token ids {ids.shape} {ids.dtype}, the first ones of the prompt {ids[-1, :8].tolist()}")

    # 5. One prompt on all devices, with one key split as many ways as there are devices.
    keys = jax.random.split(jax.random.key(0), count)
    request = GenerationRequest(PROMPT, num_inference_steps=args.steps)

    def jobs_for(prompts: Sequence[str], keys: jax.Array) -> list[PreparedJob]:
        words = np.asarray(jax.random.key_data(keys))
        return [
            engine.prepare(str(i), GenerationRequest(prompt, num_inference_steps=args.steps), key_data=words[i])
            for i, prompt in enumerate(prompts)
        ]

    images, first_s = timed(lambda: pixels_of(engine, jobs_for([request.prompt] * count, keys)))
    print(f"5. {len(images)} pictures of {images[0].shape} in {first_s:.2f} s")
    save(args.out / "one-prompt.png", images, 1)

    # 6. Time it honestly: JAX returns before the devices are done, so wait for the pixels on the host.
    again = [timed(lambda: pixels_of(engine, jobs_for([PROMPT] * count, keys)))[1] for _ in range(3)]
    print(f"6. first run {first_s:.2f} s, later runs {', '.join(f'{s:.2f} s' for s in again)}: "
          f"nothing compiles while serving, the cost was paid in step 3")  # fmt: skip
    x = jnp.ones((count, 1024, 1024))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    _, dispatch_s = timed(lambda: product(x))
    _, done_s = timed(lambda: product(x).block_until_ready())
    print(
        f"   (a product of matrices returns after {1000 * dispatch_s:.1f} ms and is done after {1000 * done_s:.1f} ms)"
    )

    # 7. Two prompts, half of the devices each; then a different prompt on every device.
    half = count // 2 or 1
    images = pixels_of(engine, jobs_for([PROMPTS[i // half % 2] for i in range(count)], keys))
    save(args.out / "two-prompts.png", images, 2)
    images = pixels_of(engine, jobs_for([PROMPTS[i % len(PROMPTS)] for i in range(count)], keys))
    save(args.out / "eight-prompts.png", images, 2)
    print("7. two prompts on half of the devices each, then a prompt of its own on every device")

    # 8. More than one picture per device: the same engine with two slots on each.
    engine, ready_s = timed(lambda: Engine(checkpoint, devices, slots_per_device=2))
    keys = jax.random.split(jax.random.key(1), engine.info.num_slots)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(engine.info.num_slots)]
    images, batch_s = timed(lambda: pixels_of(engine, jobs_for(prompts, keys)))
    print(f"8. {engine.info.num_slots} slots ready in {ready_s:.1f} s; {len(images)} pictures in {batch_s:.2f} s")
    save(args.out / "two-per-device.png", images, 2)

    # 9. What the guide cannot do: samplers, step counts, guidance and seeds mixed in the same program.
    mixed = [
        GenerationRequest(PROMPT, seed=i, num_inference_steps=steps, guidance_scale=guidance, sampler=sampler)
        for i, (sampler, steps, guidance) in enumerate(
            [("pndm", 50, 7.5), ("ddim", 20, 5.0), ("euler", 30, 7.5), ("dpmsolver++", 12, 3.0)] * half
        )
    ]
    jobs = [engine.prepare(str(i), request) for i, request in enumerate(mixed)]
    images, mixed_s = timed(lambda: pixels_of(engine, jobs))
    print(f"9. {len(images)} jobs of four samplers and 12 to 50 steps together in {mixed_s:.2f} s, nothing compiled")
    save(args.out / "mixed.png", images, 2)


def pixels_of(engine: Engine, jobs: list[PreparedJob]) -> list[np.ndarray]:
    """Run the jobs and return their pixels, on the host."""
    return [image.pixels for image in generate(engine, jobs)]


def save(path: Path, images: Sequence[np.ndarray], rows: int) -> None:
    """Turn arrays into PIL images and write them as one grid."""
    grid = image_grid([Image.fromarray(image) for image in images], rows, -(-len(images) // rows))
    grid.save(path)
    print(f"   -> {path}")


def timed(function: Callable[[], Answer]) -> tuple[Answer, float]:
    """Return a function's result and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
