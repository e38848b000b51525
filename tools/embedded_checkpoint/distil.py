"""Distil the shipped checkpoint into one that needs four steps and no guidance: a latent consistency model.

    python -m tools.embedded_checkpoint.distil --work DIR

The student starts as a copy of the teacher's UNet and learns to say at every noise level where the teacher's path
leads (arXiv 2310.04378). For a noisy latent, the teacher takes one DDIM step of a fiftieth of the path, at
`GUIDANCE_SCALE`; the student's answer before the step must be that of its own average after it. At the end of the path
the answer is the latent itself. Text encoder, tokenizer and autoencoder stay as they are.

Writes a whole checkpoint in the diffusers layout to `DIR/turbo`, and saves every 250 steps; a second run continues.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from tools.embedded_checkpoint.parts import encode_all, make_step, on_both_cores, save_part, write_index
from tools.embedded_checkpoint.train_diffusion import CAPTIONS_PER_SCENE, MAX_LENGTH, SCHEDULER_CONFIG
from tools.embedded_checkpoint.train_vae import draw_training_set

GUIDANCE_SCALE = 7.5
ORIGINAL_STEPS = 50
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
BATCH = 32
EMA_DECAY = 0.95
HUBER = 0.01
SCHEDULER = {
    "_class_name": "LCMScheduler",
    **{name: SCHEDULER_CONFIG[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")},
    "prediction_type": "v_prediction",
    "original_inference_steps": ORIGINAL_STEPS,
    "timestep_scaling": TIMESTEP_SCALING,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def main() -> None:
    """Train the student, log its loss and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the training writes")
    parser.add_argument("--teacher", default="embedded", help="a checkpoint; default: the shipped one")
    parser.add_argument("--scenes", type=int, default=12_000, help="drawn training scenes")
    parser.add_argument("--steps", type=int, default=4_000, help="optimiser steps of 32 scenes")
    parser.add_argument("--rate", type=float, default=3e-4, help="the highest learning rate")
    args = parser.parse_args()
    mesh = on_both_cores()
    teacher_folder, out = find_folder(args.teacher, "main"), args.work / "turbo"
    teacher = load_checkpoint(args.teacher)
    family = teacher.family
    assert isinstance(family, StableDiffusion)
    student = load_checkpoint(str(out)) if out.exists() else teacher

    images, scenes = draw_training_set(args.scenes, seed=8)
    latents = encode_all(teacher_folder, images).astype(np.float32)
    del images
    rng = random.Random(9)
    captions = [scene.varied_caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    ids = family.tokenizer.encode(captions)[0].reshape(len(scenes), CAPTIONS_PER_SCENE, MAX_LENGTH)
    empty_ids = family.tokenizer.encode([""])[0]

    schedule = optax.warmup_cosine_decay_schedule(1e-5, args.rate, 100, args.steps, args.rate / 30)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    signal = jnp.asarray(teacher.schedule.alphas_cumprod, jnp.float32)
    step = make_step(make_loss(family, signal, empty_ids), optimiser, mesh, EMA_DECAY)
    params = jax.tree.map(jnp.asarray, student.params["unet"])
    fixed = {name: jax.tree.map(jnp.asarray, teacher.params[name]) for name in ("text_encoder", "unet")}
    average, state = jax.tree.map(jnp.copy, params), optimiser.init(params)
    draw, started, losses = np.random.default_rng(int(time.time())), time.monotonic(), []
    for i in range(args.steps):
        chosen = draw.integers(len(latents), size=BATCH)
        batch_ids = ids[chosen, draw.integers(CAPTIONS_PER_SCENE, size=BATCH)]
        # The average of the last step is the target of this one.
        goal = {**fixed, "target": jax.tree.map(jnp.copy, average)}
        params, average, state, loss = step(
            params, average, state, goal, (latents[chosen], batch_ids), jax.random.key(i)
        )
        losses.append(loss)
        if (i + 1) % 50 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-50:])))
            print(f"{i + 1}/{args.steps} loss {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
        if (i + 1) % 250 == 0 or i + 1 == args.steps:
            save(teacher_folder, out, average)


def boundary(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how much of the latent and of the prediction are in the answer at a timestep: all and nothing at 0."""
    scaled = t * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / jnp.sqrt(scaled**2 + SIGMA_DATA**2)


def make_loss(family: StableDiffusion, signal: jax.Array, empty_ids: np.ndarray) -> Any:
    """Return the loss for `make_step`; a batch is latents, `(n, 8, 8, 4)`, and token ids, `(n, 77)`.

    Args:
        family: of teacher and student.
        signal: `(1000,) float32`, the share of signal variance left at each timestep.
        empty_ids: the token ids of an empty caption, `(1, 77) int32`.
    """
    stride = len(signal) // ORIGINAL_STEPS

    def levels(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return alpha and sigma at timesteps; at -1 all is signal."""
        share = jnp.where(t >= 0, signal[jnp.maximum(t, 0)], 1.0)[:, None, None, None]
        return jnp.sqrt(share), jnp.sqrt(1 - share)

    def answer(params: Any, x: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        alpha, sigma = levels(t)
        predicted = alpha * x - sigma * family.unet(params, x, jnp.maximum(t, 0).astype(jnp.float32), text)
        skip, out = (part[:, None, None, None] for part in boundary(jnp.maximum(t, 0).astype(jnp.float32)))
        return jnp.where((t >= 0)[:, None, None, None], skip * x + out * predicted, x)

    def loss_fn(params: Any, fixed: Any, x0: jax.Array, ids: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = x0.shape[0]
        key_t, key_noise = jax.random.split(key)
        t = (1 + jax.random.randint(key_t, (count,), 0, ORIGINAL_STEPS)) * stride - 1
        alpha, sigma = levels(t)
        x = alpha * x0 + sigma * jax.random.normal(key_noise, x0.shape)
        text = family.text_encoder(fixed["text_encoder"], jnp.concatenate([empty_ids, ids])).last_hidden_state
        free, steered = jnp.broadcast_to(text[:1], text[1:].shape), text[1:]
        times = jnp.concatenate([t, t]).astype(jnp.float32)
        both = family.unet(fixed["unet"], jnp.concatenate([x, x]), times, jnp.concatenate([free, steered]))
        v_free, v_steered = jnp.split(both, 2)
        v = v_free + GUIDANCE_SCALE * (v_steered - v_free)
        clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
        next_alpha, next_sigma = levels(t - stride)
        target = jax.lax.stop_gradient(
            answer(fixed["target"], next_alpha * clean + next_sigma * noise, t - stride, steered)
        )
        error = jnp.sum((answer(params, x, t, steered) - target) ** 2, axis=(1, 2, 3))
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
