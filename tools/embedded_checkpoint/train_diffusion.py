"""Train the text encoder and the UNet of the shipped checkpoint, on the latents of a trained autoencoder.

    python -m tools.embedded_checkpoint.train_diffusion --work DIR

Reads `DIR/vae` (see train_vae.py) and writes a whole checkpoint in the diffusers Flax layout to `DIR/checkpoint`, with
weights in float16. Takes about 50 minutes on two cores; logs a line every 100 steps and saves every 1,000 steps.

The model predicts v, which keeps its colours right at high guidance under every sampler: the errors of an epsilon model
at the first, noisiest steps are multiplied by 1/alpha and by the guidance scale. The loss weight in terms of x0 is
1 + SNR, capped. A small auxiliary loss predicts the caption's words from the text encoder's output, so that the text
encoder becomes useful early in the training.
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
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from flax.serialization import msgpack_restore, to_bytes
from jax.sharding import Mesh, PartitionSpec
from transformers import CLIPTextConfig, CLIPTokenizer, FlaxCLIPTextModel

from sdtpu_worker.diffusion.samplers import NoiseSchedule
from tools.embedded_checkpoint.scenes import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES
from tools.embedded_checkpoint.tokenizer import MAX_LENGTH, write_tokenizer
from tools.embedded_checkpoint.train_vae import draw_training_set

SCHEDULER_CONFIG = {
    "_class_name": "FlaxDPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
WIDTH = 64
UNET_CONFIG = {
    "sample_size": IMAGE_SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}
BATCH = 32
EMPTY_CAPTIONS = 0.1
SNR_CAP = 6.0
READ_BACK_WEIGHT = 0.05
EMA_DECAY = 0.9990
CAPTIONS_PER_SCENE = 4
FIELDS = (("colour", tuple(COLOURS)), ("shape", SHAPES), ("background", tuple(COLOURS)), ("size", SIZES),
          ("position", POSITIONS))  # fmt: skip


def main() -> None:
    """Train both models together, log the loss and save the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the trained autoencoder")
    parser.add_argument("--scenes", type=int, default=24_000, help="drawn training scenes")
    parser.add_argument("--steps", type=int, default=9_000, help="optimiser steps of 32 scenes")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    out = args.work / "checkpoint"
    write_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae_config = json.loads((args.work / "vae" / "config.json").read_text())

    images, scenes = draw_training_set(args.scenes)
    latents = encode_all(args.work / "vae", vae_config, images)
    del images
    rng = random.Random(2)
    captions = [scene.varied_caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    ids = tokenise(tokenizer, captions).reshape(len(scenes), CAPTIONS_PER_SCENE, MAX_LENGTH)
    empty_ids = tokenise(tokenizer, [""])
    words = np.array([[names.index(getattr(scene, field)) for field, names in FIELDS] for scene in scenes], np.int32)

    text_encoder = FlaxCLIPTextModel(text_config(tokenizer), _do_init=False)
    unet = FlaxUNet2DConditionModel(**UNET_CONFIG)
    params = init_params(text_encoder, unet)
    schedule = optax.warmup_cosine_decay_schedule(1e-5, 1e-3, 300, args.steps, 1e-5)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    step = make_step(make_loss(text_encoder, unet), optimiser, mesh, EMA_DECAY)
    print(f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(params)):,}", flush=True)
    average, state = jax.tree.map(jnp.copy, params), optimiser.init(params)
    draw, started, losses = np.random.default_rng(3), time.monotonic(), []
    for i in range(args.steps):
        chosen = draw.integers(len(latents), size=BATCH)
        batch_ids = ids[chosen, draw.integers(CAPTIONS_PER_SCENE, size=BATCH)]
        batch_ids = np.where(draw.random((BATCH, 1)) < EMPTY_CAPTIONS, empty_ids, batch_ids)
        params, average, state, loss = step(
            params, average, state, None, (latents[chosen], batch_ids, words[chosen]), jax.random.key(i)
        )
        losses.append(loss)
        if (i + 1) % 100 == 0:
            mean = float(jnp.mean(jnp.stack(losses[-100:])))
            print(f"{i + 1}/{args.steps} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (i + 1) % 1_000 == 0 or i + 1 == args.steps:
            save(average, text_encoder, args.work, out)


def init_params(text_encoder: FlaxCLIPTextModel, unet: FlaxUNet2DConditionModel) -> dict:
    """Return the parameters to train: of both models, and of the heads that read the caption's words back."""
    return {
        "text_encoder": text_encoder.init_weights(jax.random.key(1), (1, MAX_LENGTH)),
        "unet": unet.init_weights(jax.random.key(2)),
        "read_back": {
            name: 0.02 * jax.random.normal(jax.random.key(i), (WIDTH, len(names)))
            for i, (name, names) in enumerate(FIELDS)
        },
    }


def make_loss(text_encoder: FlaxCLIPTextModel, unet: FlaxUNet2DConditionModel) -> Any:
    """Return the loss for `make_step`; a batch is latents, token ids and the words of the captions as numbers."""
    signal = jnp.asarray(NoiseSchedule.from_config(SCHEDULER_CONFIG).alphas_cumprod, jnp.float32)

    def loss_fn(params, _, x0, ids, words, key):
        count = x0.shape[0]
        key_t, key_noise = jax.random.split(key)
        t = ((jnp.arange(count) + jax.random.uniform(key_t, (count,))) / count * len(signal)).astype(jnp.int32)
        alpha = jnp.sqrt(signal[t])[:, None, None, None]
        sigma = jnp.sqrt(1 - signal[t])[:, None, None, None]
        noise = jax.random.normal(key_noise, x0.shape)
        text = text_encoder(ids, params=params["text_encoder"])[0]
        v = unet.apply({"params": params["unet"]}, alpha * x0 + sigma * noise, t, text).sample
        weight = jnp.minimum(1 / sigma**2, SNR_CAP) * sigma**2
        loss = jnp.mean(weight * (v - (alpha * noise - sigma * x0)) ** 2)
        state = text[:, :20].mean(1)
        captioned = ids[:, 1] != ids[:, 2]
        read_back = sum(
            jnp.mean(captioned * optax.softmax_cross_entropy_with_integer_labels(state @ head, words[:, i]))
            for i, head in enumerate(params["read_back"][name] for name, _ in FIELDS)
        )
        return loss + READ_BACK_WEIGHT * read_back, loss

    return loss_fn


def make_step(loss_fn: Any, optimiser: optax.GradientTransformation, mesh: Mesh, ema_decay: float) -> Any:
    """Return the compiled, data-parallel training step with an average of the parameters.

    Args:
        loss_fn: `loss_fn(params, fixed, *batch, key) -> (loss, the part of the loss to log)`.
        optimiser: updates the parameters.
        mesh: the devices, with one axis named "batch".
        ema_decay: the share of the averaged parameters that a step keeps.

    Returns:
        `step(params, average, state, fixed, batch, key) -> (params, average, state, logged)`. The first three
        arguments are donated; every array of `batch` is split over the mesh.
    """

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, average, state, fixed, batch, key):
        def local(params, fixed, batch, key):
            key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
            (_, logged), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, fixed, *batch, key)
            return jax.lax.pmean((logged, grads), "batch")

        whole, split = PartitionSpec(), PartitionSpec("batch")
        logged, grads = jax.shard_map(
            local, mesh=mesh, in_specs=(whole, whole, split, whole), out_specs=whole, check_vma=False
        )(params, fixed, batch, key)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, average, params)
        return params, average, state, logged

    return step


def encode_all(folder: Path, config: dict, images: np.ndarray) -> np.ndarray:
    """Return the scaled latents of images `(count, 3, 64, 64) uint8`, as `(count, 4, 8, 8) float32`."""
    vae = FlaxAutoencoderKL(**{name: value for name, value in config.items() if not name.startswith("_")})
    params = msgpack_restore((folder / "diffusion_flax_model.msgpack").read_bytes())
    encode = jax.jit(lambda x: vae.apply({"params": params}, x / 127.5 - 1, method=vae.encode).latent_dist.mean)
    parts = [np.asarray(encode(images[i : i + 50])) for i in range(0, len(images), 50)]
    return np.concatenate(parts).transpose(0, 3, 1, 2) * np.float32(config["scaling_factor"])


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """Return the captions' token ids, `(len(captions), 77) int32`."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="np")
    return batch.input_ids.astype(np.int32)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the config of the tiny CLIP text model."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save(params: dict, text_encoder: FlaxCLIPTextModel, work: Path, out: Path) -> None:
    """Write the whole checkpoint to `out`, with weights in float16; the autoencoder is copied from `work`."""

    def half(tree: dict) -> bytes:
        return to_bytes(jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), jax.device_get(tree)))

    for name in ("unet", "vae", "text_encoder", "scheduler"):
        (out / name).mkdir(parents=True, exist_ok=True)
    unet_config = {"_class_name": "FlaxUNet2DConditionModel", **UNET_CONFIG}
    (out / "unet" / "config.json").write_text(json.dumps(unet_config, indent=2) + "\n")
    (out / "unet" / "diffusion_flax_model.msgpack").write_bytes(half(params["unet"]))
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(out / "text_encoder")
    (out / "text_encoder" / "flax_model.msgpack").write_bytes(half(params["text_encoder"]))
    shutil.copy(work / "vae" / "config.json", out / "vae" / "config.json")
    vae = msgpack_restore((work / "vae" / "diffusion_flax_model.msgpack").read_bytes())
    (out / "vae" / "diffusion_flax_model.msgpack").write_bytes(half(vae))
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG, indent=2) + "\n")
    index = {
        "_class_name": "FlaxStableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "FlaxDPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "FlaxUNet2DConditionModel"],
        "vae": ["diffusers", "FlaxAutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
