"""Train the autoencoder of the shipped checkpoint.

    python -m tools.embedded_checkpoint.train_vae --work DIR

Takes about 25 minutes on two cores and logs a line every 50 steps. Writes `DIR/vae/`: the config and the weights in the
diffusers Flax layout, in float32, and `reconstructions.png`, which shows held-out scenes above their reconstructions.

The training has two phases. The first trains encoder and decoder together, on squared and absolute errors with more
weight near edges, and a small KL term. The second trains the decoder alone, on latents with a little noise, so that
small errors of the UNet do little harm.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL
from flax.serialization import to_bytes
from jax.sharding import Mesh, PartitionSpec
from PIL import Image

from tools.embedded_checkpoint.scenes import IMAGE_SIZE, every_scene

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": IMAGE_SIZE,
}
BATCH = 16
KL_WEIGHT = 1e-3
EDGE_WEIGHT = 4.0
LATENT_NOISE = 0.12
_REPLICATED = PartitionSpec()
_SPLIT = PartitionSpec("batch")


def draw_training_set(count: int, seed: int = 0) -> tuple[np.ndarray, list]:
    """Return pictures of `count` training scenes, `(count, 3, 64, 64) uint8`, and their `Scene`s; none is held out."""
    rng = random.Random(seed)
    scenes = [scene for scene in every_scene() if not scene.held_out]
    rng.shuffle(scenes)
    chosen = [scenes[i % len(scenes)] for i in range(count)]
    pixels = np.stack([np.asarray(scene.draw(rng)).transpose(2, 0, 1) for scene in chosen])
    return pixels, chosen


def edge_weights(x: jax.Array) -> jax.Array:
    """Return loss weights for each pixel, `(n, 1, h, w)`: 1 on plain areas, up to 1 + EDGE_WEIGHT near an edge."""
    dx = jnp.abs(jnp.diff(x, axis=3, append=x[..., -1:])).max(1, keepdims=True)
    dy = jnp.abs(jnp.diff(x, axis=2, append=x[..., -1:, :])).max(1, keepdims=True)
    edges = jnp.clip(dx + dy, 0, 1)
    edges = jax.lax.reduce_window(edges, 0.0, jax.lax.max, (1, 1, 5, 5), (1, 1, 1, 1), "SAME")
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
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    out = args.work / "vae"
    out.mkdir(parents=True, exist_ok=True)
    images, _ = draw_training_set(args.scenes)
    vae = FlaxAutoencoderKL(**CONFIG)
    params = vae.init_weights(jax.random.key(0))

    joint_loss, decoder_loss = make_losses(vae)
    for name, loss_fn, steps, peak in (
        ("joint", joint_loss, args.steps, 2e-3),
        ("decoder", decoder_loss, args.decoder_steps, 1e-3),
    ):
        schedule = optax.warmup_cosine_decay_schedule(1e-4, peak, 100, steps, peak / 20)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
        state = optimiser.init(params)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, x, key, loss_fn=loss_fn, optimiser=optimiser):
            def local(params, x, key):
                key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
                x = x.astype(jnp.float32) / 127.5 - 1
                return jax.lax.pmean(jax.value_and_grad(loss_fn)(params, x, key), "batch")

            specs = (_REPLICATED, _SPLIT, _REPLICATED)
            loss, grads = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_REPLICATED, check_vma=False)(
                params, x, key
            )
            updates, state = optimiser.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        rng, started, losses = np.random.default_rng(len(name)), time.monotonic(), []
        for i in range(steps):
            batch = images[rng.integers(len(images), size=BATCH)]
            params, state, loss = step(params, state, batch, jax.random.key(i))
            losses.append(loss)
            if (i + 1) % 50 == 0:
                mean = float(jnp.mean(jnp.stack(losses[-50:])))
                print(f"{name} {i + 1}/{steps} loss {mean:.5f} {time.monotonic() - started:.0f} s", flush=True)
            if (i + 1) % 400 == 0 or i + 1 == steps:
                save(vae, params, images, out)


def make_losses(vae: FlaxAutoencoderKL) -> tuple[Any, Any]:
    """Return the losses of the two phases, each `loss_fn(params, x, key)` of a batch in [-1, 1]."""

    def joint_loss(params, x, key):
        posterior = vae.apply({"params": params}, x, method=vae.encode).latent_dist
        z = posterior.sample(key).transpose(0, 3, 1, 2)
        y = vae.apply({"params": params}, z, method=vae.decode).sample
        return reconstruction_loss(x, y) + KL_WEIGHT * jnp.mean(posterior.kl()) / posterior.mean[0].size

    def decoder_loss(params, x, key):
        z = vae.apply({"params": params}, x, method=vae.encode).latent_dist.mean
        z = jax.lax.stop_gradient(z)
        z = z + LATENT_NOISE * jnp.std(z) * jax.random.normal(key, z.shape)
        y = vae.apply({"params": params}, z.transpose(0, 3, 1, 2), method=vae.decode).sample
        return reconstruction_loss(x, y)

    return joint_loss, decoder_loss


def save(vae: FlaxAutoencoderKL, params: dict, images: np.ndarray, out: Path) -> None:
    """Write the config, the weights and a picture of reconstructions; the scaling factor is measured on `images`."""
    encode = jax.jit(lambda x: vae.apply({"params": params}, x / 127.5 - 1, method=vae.encode).latent_dist.mean)
    decode = jax.jit(lambda z: vae.apply({"params": params}, z.transpose(0, 3, 1, 2), method=vae.decode).sample)
    scaling_factor = 1 / float(jnp.std(jnp.concatenate([encode(images[i : i + 64]) for i in range(0, 1024, 64)])))
    config = {"_class_name": "FlaxAutoencoderKL", **CONFIG, "act_fn": "silu", "scaling_factor": scaling_factor}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "diffusion_flax_model.msgpack").write_bytes(to_bytes(jax.device_get(params)))
    rng = random.Random(1)
    held_out = rng.sample([scene for scene in every_scene() if scene.held_out], 32)
    x = np.stack([np.asarray(scene.draw(rng)).transpose(2, 0, 1) for scene in held_out])
    y = np.clip((np.asarray(decode(encode(x))) + 1) * 127.5, 0, 255).astype(np.uint8)
    rows = [np.concatenate(list(row.transpose(0, 2, 3, 1)), axis=1) for row in (x[:16], y[:16], x[16:], y[16:])]
    Image.fromarray(np.concatenate(rows)).save(out / "reconstructions.png")


if __name__ == "__main__":
    main()
