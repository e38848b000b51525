"""Train the autoencoder of the shipped checkpoint.

    python -m tools.embedded_checkpoint.train_vae --work DIR

Takes about 25 minutes on two cores and logs a line every 50 steps. Writes `DIR/vae/`: the config and the weights under
PyTorch's names, in float32, and `reconstructions.png`, which shows held-out scenes above their reconstructions.

The training has two phases. The first trains encoder and decoder together, on squared and absolute errors with more
weight near edges, and a small KL term. The second trains the decoder alone, on latents with a little noise, so that
small errors of the UNet do little harm.
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
from PIL import Image

from sdtpu_worker.models.network import Network
from tools.embedded_checkpoint.parts import Params, autoencoder, init_params, make_step, on_both_cores, save_part
from tools.embedded_checkpoint.scenes import IMAGE_SIZE, every_scene

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": IMAGE_SIZE,
}
BATCH = 16
KL_WEIGHT = 1e-3
EDGE_WEIGHT = 4.0
LATENT_NOISE = 0.12


def draw_training_set(count: int, seed: int = 0) -> tuple[np.ndarray, list]:
    """Return pictures of `count` training scenes, `(count, 64, 64, 3) uint8`, and their `Scene`s; none is held out."""
    rng = random.Random(seed)
    scenes = [scene for scene in every_scene() if not scene.held_out]
    rng.shuffle(scenes)
    chosen = [scenes[i % len(scenes)] for i in range(count)]
    pixels = np.stack([np.asarray(scene.draw(rng)) for scene in chosen])
    return pixels, chosen


def edge_weights(x: jax.Array) -> jax.Array:
    """Return loss weights for each pixel, `(n, h, w, 1)`: 1 on plain areas, up to 1 + EDGE_WEIGHT near an edge."""
    dx = jnp.abs(jnp.diff(x, axis=2, append=x[:, :, -1:])).max(-1, keepdims=True)
    dy = jnp.abs(jnp.diff(x, axis=1, append=x[:, -1:])).max(-1, keepdims=True)
    edges = jnp.clip(dx + dy, 0, 1)
    edges = jax.lax.reduce_window(edges, 0.0, jax.lax.max, (1, 5, 5, 1), (1, 1, 1, 1), "SAME")
    return 1 + EDGE_WEIGHT * edges


def reconstruction_loss(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the edge-weighted error between two batches in [-1, 1]."""
    weights = edge_weights(x)
    return jnp.mean(weights * ((x - y) ** 2 + 0.1 * jnp.abs(x - y)))


def main() -> None:
    """Train in two phases, log the loss and save the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the training writes")
    parser.add_argument("--scenes", type=int, default=24_000, help="drawn training scenes")
    parser.add_argument("--steps", type=int, default=1_900, help="steps of encoder and decoder together")
    parser.add_argument("--decoder-steps", type=int, default=1_000, help="further steps of the decoder alone")
    args = parser.parse_args()
    mesh = on_both_cores()
    images, _ = draw_training_set(args.scenes)
    encoder, decoder, shapes = autoencoder(CONFIG)
    params = init_params(shapes, jax.random.key(0))

    joint_loss, decoder_loss = make_losses(encoder, decoder)
    for name, loss_fn, steps, peak in (
        ("joint", joint_loss, args.steps, 2e-3),
        ("decoder", decoder_loss, args.decoder_steps, 1e-3),
    ):
        schedule = optax.warmup_cosine_decay_schedule(1e-4, peak, 100, steps, peak / 20)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
        state, step = optimiser.init(params), make_step(loss_fn, optimiser, mesh, ema_decay=0.0)
        rng, started, losses = np.random.default_rng(len(name)), time.monotonic(), []
        average = jax.tree.map(jnp.copy, params)
        for i in range(steps):
            batch = images[rng.integers(len(images), size=BATCH)]
            params, average, state, loss = step(params, average, state, None, (batch,), jax.random.key(i))
            losses.append(loss)
            if (i + 1) % 50 == 0:
                mean = float(jnp.mean(jnp.stack(losses[-50:])))
                print(f"{name} {i + 1}/{steps} loss {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
            if (i + 1) % 400 == 0 or i + 1 == steps:
                save(encoder, decoder, params, images, args.work)


def make_losses(encoder: Network, decoder: Network) -> tuple[Any, Any]:
    """Return the losses of the two phases for `make_step`; a batch is pictures, `(n, 64, 64, 3) uint8`."""

    def joint_loss(params, _, pixels, key):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        moments = encoder(params, x)
        z = moments.mean + jnp.exp(moments.logvar / 2) * jax.random.normal(key, moments.mean.shape)
        divergence = (moments.mean**2 + jnp.exp(moments.logvar) - 1 - moments.logvar) / 2
        loss = reconstruction_loss(x, decoder(params, z)) + KL_WEIGHT * jnp.mean(divergence)
        return loss, loss

    def decoder_loss(params, _, pixels, key):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        z = jax.lax.stop_gradient(encoder(params, x).mean)
        z = z + LATENT_NOISE * jnp.std(z) * jax.random.normal(key, z.shape)
        loss = reconstruction_loss(x, decoder(params, z))
        return loss, loss

    return joint_loss, decoder_loss


def save(encoder: Network, decoder: Network, params: Params, images: np.ndarray, work: Path) -> None:
    """Write the config, the weights and a picture of reconstructions; the scaling factor is measured on `images`."""
    encode = jax.jit(lambda x: encoder(params, x / 127.5 - 1).mean)
    decode = jax.jit(lambda z: decoder(params, z))
    parts = [encode(images[i : i + 64].astype(np.float32)) for i in range(0, 1024, 64)]
    scaling_factor = 1 / float(jnp.std(jnp.concatenate(parts)))
    config = {"_class_name": "AutoencoderKL", **CONFIG, "act_fn": "silu", "scaling_factor": scaling_factor}
    save_part(work, "vae", config, params, np.float32)
    rng = random.Random(1)
    held_out = rng.sample([scene for scene in every_scene() if scene.held_out], 32)
    x = np.stack([np.asarray(scene.draw(rng)) for scene in held_out])
    y = np.clip((np.asarray(decode(encode(x.astype(np.float32)))) + 1) * 127.5, 0, 255).astype(np.uint8)
    rows = [np.concatenate(list(row), axis=1) for row in (x[:16], y[:16], x[16:], y[16:])]
    Image.fromarray(np.concatenate(rows)).save(work / "vae" / "reconstructions.png")


if __name__ == "__main__":
    main()
