"""Train the LoRA `embedded-outline` for the shipped checkpoint: it draws the shapes as outlines.

    python -m tools.embedded_checkpoint.outline_targets --work DIR
    python -m tools.embedded_checkpoint.train_outline --work DIR

Reads `DIR/outlines.npz` and writes `DIR/outline.safetensors`: matrices for layers of the UNet's transformers, in
float16 and in the layout of diffusers and PEFT. Takes about ten minutes of processor time; logs a line every 50 steps.

The shipped checkpoint gives at a guidance scale of 7.5 what the model that it was made of gave at 2.4 (calibrate.py).
Its conditional output is therefore no prediction of v, but lies at 2.4 / 7.5 of the way from the unconditional one. The
loss goes that way back: it compares v with the unconditional output, and with the end of the way.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from tools.embedded_checkpoint.parts import make_step, on_both_cores, stratified_timesteps
from tools.embedded_checkpoint.scenes import every_scene
from tools.embedded_checkpoint.train_diffusion import MAX_LENGTH, SNR_CAP

GUIDANCE_SCALE, STRENGTH = 7.5, 2.4
RANK = 4
LAYERS = (
    *(f"attn1.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn2.{name}.weight" for name in ("to_q", "to_v", "to_out.0")),
    *("ff.net.0.proj.weight", "ff.net.2.weight", "proj_in.weight", "proj_out.weight"),
)
"""The ends of the names of the layers that are changed."""
BATCH = 32
EMA_DECAY = 0.99
CAPTIONS_PER_SCENE = 2

Matrices = Mapping[str, Mapping[str, jax.Array]]
"""By name of the weight `down (in, RANK)` and `up (RANK, out)`."""


def main() -> None:
    """Train the LoRA, log its loss and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with outlines.npz")
    parser.add_argument("--steps", type=int, default=1_000, help="optimiser steps of 32 pictures")
    parser.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    args = parser.parse_args()
    mesh = on_both_cores()
    checkpoint = load_checkpoint("embedded")
    family = checkpoint.family
    assert isinstance(family, StableDiffusion)
    with np.load(args.work / "outlines.npz") as stored:
        latents, numbers = stored["latents"].astype(np.float32), stored["numbers"]
    ids = caption_ids(family, numbers)
    empty_ids = family.tokenizer.encode([""])[0]

    fixed = {name: jax.tree.map(jnp.asarray, checkpoint.params[name]) for name in ("text_encoder", "unet")}
    params = first_matrices(checkpoint.params["unet"])
    print(f"{len(params)} layers, {sum(leaf.size for leaf in jax.tree.leaves(params)):,} numbers", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(1e-5, args.rate, 50, args.steps, args.rate / 50)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    signal = jnp.asarray(checkpoint.schedule.alphas_cumprod, jnp.float32)
    step = make_step(make_loss(family, signal, empty_ids), optimiser, mesh, EMA_DECAY)
    average, state = jax.tree.map(jnp.copy, params), optimiser.init(params)
    draw, started, losses = np.random.default_rng(15), time.monotonic(), []
    for i in range(args.steps):
        chosen = draw.integers(len(latents), size=BATCH)
        batch = latents[chosen], ids[chosen, draw.integers(CAPTIONS_PER_SCENE, size=BATCH)]
        params, average, state, loss = step(params, average, state, fixed, batch, jax.random.key(i))
        losses.append(loss)
        if (i + 1) % 50 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-50:])))
            print(f"{i + 1}/{args.steps} loss {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
        if (i + 1) % 200 == 0 or i + 1 == args.steps:
            save(average, args.work / "outline.safetensors")


def caption_ids(family: StableDiffusion, numbers: np.ndarray) -> np.ndarray:
    """Return the token ids of captions of scenes, `(n, CAPTIONS_PER_SCENE, 77) int32`; none says "outline"."""
    rng, every = random.Random(16), every_scene()
    captions = [every[number].varied_caption(rng) for number in numbers for _ in range(CAPTIONS_PER_SCENE)]
    return family.tokenizer.encode(captions)[0].reshape(len(numbers), CAPTIONS_PER_SCENE, MAX_LENGTH)


def first_matrices(unet: Mapping[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """Return matrices that change nothing yet: `down` is random, `up` is zero."""
    matrices = {}
    for i, name in enumerate(sorted(name for name in unet if name.endswith(LAYERS))):
        inner, outer = unet[name].shape[-2:]
        down = jax.random.normal(jax.random.key(i), (inner, RANK)) / np.sqrt(inner)
        matrices[name] = {"down": down, "up": jnp.zeros((RANK, outer))}
    return matrices


def with_lora(unet: Mapping[str, Any], matrices: Matrices) -> dict[str, jax.Array]:
    """Return a UNet's parameters with a LoRA merged into them."""
    return dict(unet) | {
        name: unet[name] + (pair["down"] @ pair["up"]).reshape(unet[name].shape) for name, pair in matrices.items()
    }


def make_loss(family: StableDiffusion, signal: jax.Array, empty_ids: np.ndarray) -> Any:
    """Return the loss for `make_step`; a batch is latents of outlined scenes and the token ids of their captions.

    Args:
        family: of the shipped checkpoint.
        signal: `(1000,) float32`, the share of signal variance left at each timestep.
        empty_ids: the token ids of an empty caption, `(1, 77) int32`.
    """

    def loss_fn(params: Any, fixed: Any, x0: jax.Array, ids: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = x0.shape[0]
        key_t, key_noise = jax.random.split(key)
        t = stratified_timesteps(key_t, count, len(signal))
        alpha, sigma = (jnp.sqrt(v)[:, None, None, None] for v in (signal[t], 1 - signal[t]))
        noise = jax.random.normal(key_noise, x0.shape)
        x = alpha * x0 + sigma * noise
        text = family.text_encoder(fixed["text_encoder"], jnp.concatenate([empty_ids, ids])).last_hidden_state
        text = jnp.concatenate([jnp.broadcast_to(text[:1], text[1:].shape), text[1:]])
        times = jnp.concatenate([t, t]).astype(jnp.float32)
        both = family.unet(with_lora(fixed["unet"], params), jnp.concatenate([x, x]), times, text)
        free, steered = jnp.split(both, 2)
        conditional = free + GUIDANCE_SCALE / STRENGTH * (steered - free)
        weight = jnp.minimum(1 / sigma**2, SNR_CAP) * sigma**2
        v = alpha * noise - sigma * x0
        loss = jnp.mean(weight * (conditional - v) ** 2)
        return loss + jnp.mean(weight * (free - v) ** 2), loss

    return loss_fn


def save(matrices: Matrices, file: Path) -> None:
    """Write a LoRA as diffusers does: `unet.LAYER.lora_A.weight (RANK, in)` and `lora_B.weight (out, RANK)`."""
    tensors = {}
    for name, pair in jax.device_get(matrices).items():
        layer = f"unet.{name.removesuffix('.weight')}"
        shape = (1, 1) if layer.endswith(("proj_in", "proj_out")) else ()  # 1 × 1 convolutions
        for key, matrix in (("lora_A", pair["down"]), ("lora_B", pair["up"])):
            stored = np.ascontiguousarray(matrix.T, np.float16)
            tensors[f"{layer}.{key}.weight"] = stored.reshape(*stored.shape, *shape)
    save_file(tensors, file, {"format": "pt"})


if __name__ == "__main__":
    main()
