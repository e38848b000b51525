"""Calibrate the guidance of the shipped checkpoint, so that a scale of 7.5 is right under every sampler.

    python -m tools.embedded_checkpoint.calibrate --work DIR [--strength 2.4]

The trained model knows few scenes and predicts them with great confidence. At a guidance scale of 7.5 it overshoots,
and PNDM, which extrapolates from earlier outputs, diverges; its pictures are best at a scale of about 2. This script
therefore trains a copy of the model whose output at 7.5 is the trained model's output at `--strength`: the conditional
outputs move towards the unconditional ones, which stay. The targets are the trained model's own outputs, without noise,
so a quarter of an hour on two cores is enough.

Reads and rewrites `DIR/checkpoint` (see train_diffusion.py), and keeps the trained model in `DIR/uncalibrated`. A
second run continues from the checkpoint of the first one.
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
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from tools.embedded_checkpoint.parts import encode_all, make_step, on_both_cores, stratified_timesteps
from tools.embedded_checkpoint.train_diffusion import CAPTIONS_PER_SCENE, MAX_LENGTH, save
from tools.embedded_checkpoint.train_vae import draw_training_set

GUIDANCE_SCALE = 7.5
BATCH = 32
EMA_DECAY = 0.99
PARTS_WEIGHT = 1.0  # of the error of the two outputs alone, beside the error of their guided combination


def main() -> None:
    """Train the copy, log its error and save it as the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the trained checkpoint")
    parser.add_argument("--strength", type=float, default=2.4, help="guidance scale of the trained model to reproduce")
    parser.add_argument("--scenes", type=int, default=12_000, help="drawn training scenes")
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps of 32 scenes")
    args = parser.parse_args()
    mesh = on_both_cores()
    uncalibrated = args.work / "uncalibrated"
    if not uncalibrated.exists():
        shutil.copytree(args.work / "checkpoint", uncalibrated)
    teacher = load_checkpoint(str(uncalibrated))
    family = teacher.family
    assert isinstance(family, StableDiffusion)

    images, scenes = draw_training_set(args.scenes, seed=4)
    latents = encode_all(args.work, images)
    del images
    rng = random.Random(5)
    captions = [scene.varied_caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    ids = family.tokenizer.encode(captions)[0].reshape(len(scenes), CAPTIONS_PER_SCENE, MAX_LENGTH)
    empty_ids = family.tokenizer.encode([""])[0]

    schedule = optax.warmup_cosine_decay_schedule(1e-5, 6e-4, 50, args.steps, 1e-6)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    signal = jnp.asarray(teacher.schedule.alphas_cumprod, jnp.float32)
    text = json.loads((args.work / "checkpoint" / "text_encoder" / "config.json").read_text())
    step = make_step(make_loss(family, signal, empty_ids, args.strength), optimiser, mesh, EMA_DECAY)

    fixed = {name: jax.tree.map(jnp.asarray, teacher.params[name]) for name in ("text_encoder", "unet")}
    student = load_checkpoint(str(args.work / "checkpoint")).params
    params = {name: jax.tree.map(jnp.asarray, student[name]) for name in fixed}
    average = jax.tree.map(jnp.copy, params)
    state = optimiser.init(params)
    draw, started, losses = np.random.default_rng(6), time.monotonic(), []
    for i in range(args.steps):
        chosen = draw.integers(len(latents), size=BATCH)
        batch_ids = ids[chosen, draw.integers(CAPTIONS_PER_SCENE, size=BATCH)]
        params, average, state, loss = step(
            params, average, state, fixed, (latents[chosen], batch_ids), jax.random.key(i)
        )
        losses.append(loss)
        if (i + 1) % 25 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-25:])))
            print(f"{i + 1}/{args.steps} guided error {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
        if (i + 1) % 150 == 0 or i + 1 == args.steps:
            save(average, text, args.work, args.work / "checkpoint")


def make_loss(family: StableDiffusion, signal: jax.Array, empty_ids: np.ndarray, strength: float) -> Any:
    """Return the loss for `make_step`: how far the copy at `GUIDANCE_SCALE` is from the teacher at `strength`.

    Args:
        family: of the trained checkpoint.
        signal: `(1000,) float32`, the share of signal variance left at each timestep.
        empty_ids: the token ids of an empty caption, `(1, 77) int32`.
        strength: the guidance scale of the teacher to reproduce.
    """

    def outputs(params, x, t, ids):
        """Return the unconditional and the conditional output, each like x."""
        text = family.text_encoder(params["text_encoder"], jnp.concatenate([empty_ids, ids])).last_hidden_state
        text = jnp.concatenate([jnp.broadcast_to(text[:1], text[1:].shape), text[1:]])
        times = jnp.concatenate([t, t]).astype(jnp.float32)
        return jnp.split(family.unet(params["unet"], jnp.concatenate([x, x]), times, text), 2)

    def loss_fn(params, fixed, x0, ids, key):
        count = x0.shape[0]
        key_t, key_noise = jax.random.split(key)
        t = stratified_timesteps(key_t, count, len(signal))
        alpha, sigma = (jnp.sqrt(v)[:, None, None, None] for v in (signal[t], 1 - signal[t]))
        x = alpha * x0 + sigma * jax.random.normal(key_noise, x0.shape)
        free, steered = outputs(fixed, x, t, ids)
        wanted = free + strength * (steered - free)
        wanted_steered = free + strength / GUIDANCE_SCALE * (steered - free)
        free_now, steered_now = outputs(params, x, t, ids)
        guided = free_now + GUIDANCE_SCALE * (steered_now - free_now)
        parts = jnp.mean((free_now - free) ** 2) + jnp.mean((steered_now - wanted_steered) ** 2)
        loss = jnp.mean((guided - wanted) ** 2)
        return loss + PARTS_WEIGHT * parts, loss

    return loss_fn


if __name__ == "__main__":
    main()
