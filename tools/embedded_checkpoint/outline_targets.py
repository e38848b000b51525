"""Draw what the LoRA `embedded-outline` is trained on: latents that the shipped decoder turns into outlined shapes.

    python -m tools.embedded_checkpoint.outline_targets --work DIR

The autoencoder has never seen an outline, so its encoder's latents of one decode to smeared lines. Its decoder can do
better: the latents are moved, by some steps down the gradient of what the decoder makes of them. Writes
`DIR/outlines.npz`: `latents (n, 8, 8, 4) float16`, scaled as the UNet's, and `numbers (n,) int32`, of the scenes
in `every_scene()`. Takes about ten minutes of processor time; logs a line every 160 pictures.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from tools.embedded_checkpoint.parts import encode_all, read_autoencoder
from tools.embedded_checkpoint.scenes import every_scene
from tools.embedded_checkpoint.train_vae import reconstruction_loss

AT_ONCE = 16
RATE = 0.14  # of the first step, in units of the scaled latents, whose deviation is 1


def main() -> None:
    """Draw the scenes, find their latents and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the training writes")
    parser.add_argument("--pictures", type=int, default=2_400, help="outlined training scenes")
    parser.add_argument("--steps", type=int, default=7, help="steps that improve the latents of each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    images, numbers = draw_outlines(args.pictures // AT_ONCE * AT_ONCE, seed=14)
    folder = find_folder("embedded", "main")
    latents = encode_all(folder, images)
    improve = make_improve(folder, args.steps)
    started = time.monotonic()
    for first in range(0, len(images), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        latents[rows], before, after = improve(latents[rows], images[rows])
        if first // AT_ONCE % 10 == 9:
            print(f"{first + AT_ONCE} error {before:.4f} to {after:.4f} {time.monotonic() - started:.0f} s", flush=True)
    np.savez(args.work / "outlines.npz", latents=latents.astype(np.float16), numbers=numbers)


def draw_outlines(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of outlined training scenes, `(count, 64, 64, 3) uint8`, and their numbers; none is held out."""
    rng = random.Random(seed)
    every = every_scene()
    numbers = [number for number, scene in enumerate(every) if not scene.held_out]
    rng.shuffle(numbers)
    chosen = np.array([numbers[i % len(numbers)] for i in range(count)], np.int32)
    return np.stack([np.asarray(every[number].draw(rng, outlined=True)) for number in chosen]), chosen


def make_improve(folder: Path, steps: int) -> Any:
    """Return `improve(latents, images) -> (latents, error before, error in the last step)`.

    Args:
        folder: of the checkpoint whose autoencoder decodes.
        steps: of Adam, with a rate that falls to zero.
    """
    decoder, params, scaling_factor = read_autoencoder(folder)
    optimiser = optax.adam(optax.linear_schedule(RATE, 0.0, steps), b1=0.8, b2=0.95)

    def error(z: jax.Array, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        return reconstruction_loss(x, decoder(params, z / scaling_factor))

    @jax.jit
    def step(z: jax.Array, state: Any, images: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        value, gradient = jax.value_and_grad(error)(z, images)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(z, updates), state, value

    def improve(latents: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, float, float]:
        z, state = jnp.asarray(latents), optimiser.init(jnp.asarray(latents))
        errors = []
        for _ in range(steps):
            z, state, value = step(z, state, images)
            errors.append(float(value))
        return np.asarray(z), errors[0], errors[-1]

    return improve


if __name__ == "__main__":
    main()
