"""Distil the shipped checkpoint into one that needs four steps and no guidance: a latent consistency model.

    python -m tools.embedded_checkpoint.distil --work DIR

A consistency model says at every point of the teacher's path where that path ends (arXiv 2303.01469, 2310.04378). The
teacher is small enough to be followed to the end: `draw_paths` notes guided DDIM paths that start from noise or from a
noisy picture, and the student, a copy of the teacher's UNet, learns the end of each from any of its points. Its answer
has the boundary condition of diffusers' `LCMScheduler`. Text encoder, tokenizer and autoencoder stay as they are.

Writes the teacher's paths to `DIR/paths.npz` and a whole checkpoint in the diffusers layout to `DIR/turbo`; a second
run takes the paths from there and goes on with the student. Takes about 35 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from tools.embedded_checkpoint.parts import encode_all, make_step, on_both_cores, save_part, write_index
from tools.embedded_checkpoint.train_diffusion import MAX_LENGTH, SCHEDULER_CONFIG
from tools.embedded_checkpoint.train_vae import draw_training_set

GUIDANCE_SCALE = 7.5
LEVELS = 50  # noise levels of the student, those that an LCMScheduler chooses its steps from
JUMP = 2  # levels that the teacher crosses in one step
FROM_NOISE = 0.5  # the share of paths that start from noise alone, as every picture does
PATHS_AT_ONCE = 64
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
BATCH = 64
EMA_DECAY = 0.998
HUBER = 0.03
SCHEDULER = {
    "_class_name": "LCMScheduler",
    **{name: SCHEDULER_CONFIG[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")},
    "prediction_type": "v_prediction",
    "original_inference_steps": LEVELS,
    "timestep_scaling": TIMESTEP_SCALING,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def main() -> None:
    """Follow the teacher, train the student, log its loss and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the training writes")
    parser.add_argument("--teacher", default="embedded", help="a checkpoint; default: the shipped one")
    parser.add_argument("--paths", type=int, default=12_800, help="paths of the teacher, each of up to 25 steps")
    parser.add_argument("--steps", type=int, default=2_500, help="optimiser steps of 64 points")
    parser.add_argument("--rate", type=float, default=8e-4, help="the highest learning rate")
    args = parser.parse_args()
    mesh = on_both_cores()
    args.work.mkdir(parents=True, exist_ok=True)
    teacher_folder, out = find_folder(args.teacher, "main"), args.work / "turbo"
    teacher = load_checkpoint(args.teacher)
    family = teacher.family
    assert isinstance(family, StableDiffusion)
    signal = jnp.asarray(teacher.schedule.alphas_cumprod, jnp.float32)
    fixed = {name: jax.tree.map(jnp.asarray, teacher.params[name]) for name in ("text_encoder", "unet")}

    file = args.work / "paths.npz"
    if not file.exists():
        split = NamedSharding(mesh, PartitionSpec("batch"))
        paths = draw_paths(family, fixed, signal, teacher_folder, args.paths, split)
        np.savez(file, **paths)  # type: ignore[arg-type]  # no array is named `allow_pickle`
    with np.load(file) as stored:
        points, levels, owners, ends, ids = (stored[name] for name in ("points", "levels", "owners", "ends", "ids"))
    print(f"{len(points):,} points of {len(ends):,} paths", flush=True)

    schedule = optax.warmup_cosine_decay_schedule(1e-5, args.rate, 200, args.steps, args.rate / 50)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    step = make_step(make_loss(family, signal), optimiser, mesh, EMA_DECAY)
    student = load_checkpoint(str(out)) if out.exists() else teacher
    params = jax.tree.map(jnp.asarray, student.params["unet"])
    average, state = jax.tree.map(jnp.copy, params), optimiser.init(params)
    draw, started, losses = np.random.default_rng(int(time.time())), time.monotonic(), []
    for i in range(args.steps):
        chosen = draw.integers(len(points), size=BATCH)
        owner = owners[chosen]
        batch = (points[chosen].astype(np.float32), levels[chosen], ends[owner].astype(np.float32), ids[owner])
        params, average, state, loss = step(params, average, state, fixed, batch, jax.random.key(i))
        losses.append(loss)
        if (i + 1) % 100 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-100:])))
            print(f"{i + 1}/{args.steps} loss {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
        if (i + 1) % 500 == 0 or i + 1 == args.steps:
            save(teacher_folder, out, average)


def amounts(signal: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how much signal and how much noise are in latents of a level, `1..LEVELS`; level 0 is all signal."""
    timestep = level * (len(signal) // LEVELS) - 1
    share = jnp.where(level > 0, signal[jnp.maximum(timestep, 0)], 1.0)
    return jnp.sqrt(share), jnp.sqrt(1 - share)


def draw_paths(
    family: StableDiffusion, fixed: Any, signal: jax.Array, folder: Path, count: int, split: NamedSharding
) -> dict[str, np.ndarray]:
    """Follow the teacher from `count` starts, and return every point that it passed.

    Half of the starts are noise; the others are pictures of the training set with noise of a level drawn evenly.

    Args:
        family: of the teacher.
        fixed: the teacher's parameters.
        signal: `(1000,) float32`, the share of signal variance left at each timestep.
        folder: of the teacher, whose autoencoder encodes the pictures.
        count: of paths, rounded down to whole batches.
        split: how a batch lies on the devices.

    Returns:
        `points`, `(n, 8, 8, 4) float16`; their `levels`, `(n,) int32`; their `owners`, `(n,) int32`, rows of `ends`,
        `(count, 8, 8, 4) float16`, and of `ids`, `(count, 77) int32`.
    """
    images, scenes = draw_training_set(count, seed=8)
    latents = encode_all(folder, images).astype(np.float32)
    del images
    rng = random.Random(9)
    ids = family.tokenizer.encode([scene.varied_caption(rng) for scene in scenes])[0].reshape(-1, MAX_LENGTH)
    empty_ids = family.tokenizer.encode([""])[0]

    @partial(jax.jit, out_shardings=split)
    def start(latents: jax.Array, level: jax.Array, key: jax.Array) -> jax.Array:
        alpha, sigma = amounts(signal, level)
        return alpha * latents + sigma * jax.random.normal(key, latents.shape)

    @partial(jax.jit, out_shardings=split)
    def advance(x: jax.Array, level: jax.Array, text: jax.Array) -> jax.Array:
        alpha, sigma = amounts(signal, level)
        timestep = (level * (len(signal) // LEVELS) - 1).astype(jnp.float32)
        both = family.unet(fixed["unet"], jnp.concatenate([x, x]), jnp.broadcast_to(timestep, 2 * len(x)), text)
        v_free, v_steered = jnp.split(both, 2)
        v = v_free + GUIDANCE_SCALE * (v_steered - v_free)
        next_alpha, next_sigma = amounts(signal, jnp.maximum(level - JUMP, 0))
        return next_alpha * (alpha * x - sigma * v) + next_sigma * (sigma * x + alpha * v)

    @jax.jit
    def encode(ids: jax.Array) -> jax.Array:
        states = family.text_encoder(fixed["text_encoder"], jnp.concatenate([empty_ids, ids])).last_hidden_state
        free, steered = states[:1], states[1:]
        return jnp.concatenate([jnp.broadcast_to(free, steered.shape), steered])

    draw, started = np.random.default_rng(10), time.monotonic()
    points: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for first in range(0, count - PATHS_AT_ONCE + 1, PATHS_AT_ONCE):
        rows = np.arange(first, first + PATHS_AT_ONCE, dtype=np.int32)
        noise_alone = draw.random() < FROM_NOISE
        level = LEVELS if noise_alone else int(draw.integers(1, LEVELS + 1))
        origin = np.zeros_like(latents[rows]) if noise_alone else latents[rows]
        x, text = start(origin, level, jax.random.key(first)), encode(ids[rows])
        if noise_alone:
            x = x / amounts(signal, jnp.asarray(level))[1]
        while level > 0:
            points.append(np.asarray(x, np.float16))
            levels.append(np.full(PATHS_AT_ONCE, level, np.int32))
            owners.append(rows)
            x = advance(x, level, text)
            level -= JUMP
        ends.append(np.asarray(x, np.float16))
        if (first // PATHS_AT_ONCE) % 20 == 19:
            print(f"{first + PATHS_AT_ONCE}/{count} paths {time.monotonic() - started:.0f} s", flush=True)
    found: dict[str, list[np.ndarray]] = {"points": points, "levels": levels, "owners": owners, "ends": ends}
    return {**{name: np.concatenate(parts) for name, parts in found.items()}, "ids": ids}


def make_loss(family: StableDiffusion, signal: jax.Array) -> Any:
    """Return the loss for `make_step`; a batch is points, their levels, the ends of their paths and token ids."""

    def loss_fn(
        params: Any, fixed: Any, x: jax.Array, level: jax.Array, end: jax.Array, ids: jax.Array, _: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        text = family.text_encoder(fixed["text_encoder"], ids).last_hidden_state
        timestep = (level * (len(signal) // LEVELS) - 1).astype(jnp.float32)
        v = family.unet(params, x, timestep, text)
        scaled = timestep * TIMESTEP_SCALING
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / jnp.sqrt(scaled**2 + SIGMA_DATA**2)
        alpha, sigma, skip, out = (part[:, None, None, None] for part in (*amounts(signal, level), skip, out))
        answer = skip * x + out * (alpha * x - sigma * v)
        error = jnp.mean((answer - end) ** 2, axis=(1, 2, 3))
        loss = jnp.mean(jnp.sqrt(error + HUBER**2) - HUBER)
        return loss, loss

    return loss_fn


def save(teacher: Path, out: Path, unet: Any) -> None:
    """Write the student: everything of the teacher but the UNet's weights and the scheduler."""
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.copytree(teacher / part, out / part, dirs_exist_ok=True)
    save_part(out, "unet", json.loads((teacher / "unet" / "config.json").read_text()), unet)
    write_index(out, SCHEDULER)


if __name__ == "__main__":
    main()
