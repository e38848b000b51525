"""Train the text encoder and the UNet of the shipped checkpoint, on the latents of a trained autoencoder.

    python -m tools.embedded_checkpoint.train_diffusion --work DIR

Reads `DIR/vae` (see train_vae.py) and writes a whole checkpoint in the diffusers layout to `DIR/checkpoint`, with
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
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_clip_text_config, read_unet_config
from sdtpu_worker.models.layout import from_pytorch
from sdtpu_worker.models.network import Network
from tools.embedded_checkpoint.parts import (
    FILES,
    encode_all,
    init_params,
    make_step,
    on_both_cores,
    save_part,
    stratified_timesteps,
    write_index,
)
from tools.embedded_checkpoint.scenes import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES
from tools.embedded_checkpoint.tokenizer import MAX_LENGTH, write_tokenizer
from tools.embedded_checkpoint.train_vae import draw_training_set

SCHEDULER_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
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
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 64],
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
    mesh = on_both_cores()
    out = args.work / "checkpoint"
    write_tokenizer(out / "tokenizer")
    tokenizer = PromptTokenizer.from_folder(out / "tokenizer", MAX_LENGTH)

    images, scenes = draw_training_set(args.scenes)
    latents = encode_all(args.work, images)
    del images
    rng = random.Random(2)
    captions = [scene.varied_caption(rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    ids = tokenizer.encode(captions)[0].reshape(len(scenes), CAPTIONS_PER_SCENE, MAX_LENGTH)
    empty_ids = tokenizer.encode([""])[0]
    words = np.array([[names.index(getattr(scene, field)) for field, names in FIELDS] for scene in scenes], np.int32)

    text = text_config(out / "tokenizer", tokenizer)
    text_encoder, unet = (
        networks.text_encoder(read_clip_text_config(text)),
        networks.unet(read_unet_config(UNET_CONFIG)),
    )
    params = first_params(text_encoder, unet)
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
            save(average, text, args.work, out)


def first_params(text_encoder: Network, unet: Network) -> dict:
    """Return the parameters to train: of both models, and of the heads that read the caption's words back."""
    return {
        "text_encoder": init_params(text_encoder.shapes, jax.random.key(1)),
        "unet": init_params(unet.shapes, jax.random.key(2)),
        "read_back": {
            name: 0.02 * jax.random.normal(jax.random.key(i), (WIDTH, len(names)))
            for i, (name, names) in enumerate(FIELDS)
        },
    }


def make_loss(text_encoder: Network, unet: Network) -> Any:
    """Return the loss for `make_step`; a batch is latents, token ids and the words of the captions as numbers."""
    signal = jnp.asarray(NoiseSchedule.from_config(SCHEDULER_CONFIG).alphas_cumprod, jnp.float32)

    def loss_fn(params, _, x0, ids, words, key):
        count = x0.shape[0]
        key_t, key_noise = jax.random.split(key)
        t = stratified_timesteps(key_t, count, len(signal))
        alpha = jnp.sqrt(signal[t])[:, None, None, None]
        sigma = jnp.sqrt(1 - signal[t])[:, None, None, None]
        noise = jax.random.normal(key_noise, x0.shape)
        text = text_encoder(params["text_encoder"], ids).last_hidden_state
        v = unet(params["unet"], alpha * x0 + sigma * noise, t.astype(jnp.float32), text)
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


def text_config(folder: Path, tokenizer: PromptTokenizer) -> dict[str, Any]:
    """Return the config of the tiny CLIP text model."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def save(params: dict, text: dict[str, Any], work: Path, out: Path) -> None:
    """Write the whole checkpoint to `out`, with weights in float16; the autoencoder is copied from `work`."""
    save_part(out, "unet", {"_class_name": "UNet2DConditionModel", **UNET_CONFIG}, params["unet"])
    save_part(out, "text_encoder", text, params["text_encoder"])
    vae = {name: from_pytorch(name, value) for name, value in load_file(work / "vae" / FILES["vae"]).items()}
    save_part(out, "vae", json.loads((work / "vae" / "config.json").read_text()), vae)
    write_index(out, SCHEDULER_CONFIG)


if __name__ == "__main__":
    main()
