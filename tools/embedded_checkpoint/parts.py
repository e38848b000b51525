"""Parameters of networks before and after a training, and a checkpoint's parts as files.

A checkpoint in training is a dictionary: by part, then by PyTorch's name of a tensor, in the layout of
`sdtpu_worker.models`. On disk it is a folder in the diffusers layout, with safetensors under PyTorch's names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.part_files import open_part
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_autoencoder_config
from sdtpu_worker.models.layout import to_pytorch
from sdtpu_worker.models.network import Network

Params = dict[str, Any]

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
EMBEDDING_DEVIATION = 0.02
_ENCODED_AT_ONCE = 50


def init_params(shapes: Mapping[str, tuple[int, ...]], key: jax.Array) -> Params:
    """Return parameters to start a training with, float32.

    Weights are normal with a variance of one over the number of inputs, those of norms one, biases zero.

    Args:
        shapes: of a network, by tensor name.
        key: decides all of them; a tensor's values do not depend on what other tensors there are.
    """
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("_embedding.weight"):
            deviation = EMBEDDING_DEVIATION
        elif len(shape) > 1:
            deviation = 1 / math.sqrt(math.prod(shape[:-1]))
        else:
            params[name] = jnp.full(shape, float(name.endswith("weight")))
            continue
        params[name] = deviation * jax.random.normal(jax.random.fold_in(key, i), shape)
    return params


def save_part(folder: Path, part: str, config: Mapping[str, Any], params: Params, dtype: Any = np.float16) -> None:
    """Write a part of a checkpoint: its config and its weights.

    Args:
        folder: of the checkpoint.
        part: `unet`, `vae` or `text_encoder`.
        config: with the name of PyTorch's class.
        params: by tensor name.
        dtype: of the file.
    """
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    host = {name: to_pytorch(name, np.asarray(value, dtype)) for name, value in jax.device_get(params).items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in sorted(host.items())}
    save_file(tensors, folder / part / FILES[part], {"format": "pt"})


def autoencoder(config: Mapping[str, Any]) -> tuple[Network, Network, dict[str, tuple[int, ...]]]:
    """Return the encoder, the decoder, and the shapes of the parameters of both together."""
    read = read_autoencoder_config(config)
    encoder, decoder = networks.encoder(read), networks.decoder(read)
    return encoder, decoder, {**encoder.shapes, **decoder.shapes}


def encode_all(folder: Path, images: np.ndarray) -> np.ndarray:
    """Return what a UNet is trained on: the scaled latents of images.

    Args:
        folder: of the checkpoint whose part `vae` encodes.
        images: `(count, 64, 64, 3) uint8`.

    Returns:
        `(count, 8, 8, 4) float32`.
    """
    config = json.loads((folder / "vae" / "config.json").read_text())
    encoder, _, shapes = autoencoder(config)
    params = read_weights(open_part(folder, "vae"), shapes, jnp.float32)
    encode = jax.jit(lambda x: encoder(params, x / 127.5 - 1).mean)
    parts = [images[i : i + _ENCODED_AT_ONCE] for i in range(0, len(images), _ENCODED_AT_ONCE)]
    return np.concatenate([np.asarray(encode(part.astype(np.float32))) for part in parts]) * np.float32(
        config["scaling_factor"]
    )


def read_autoencoder(folder: Path) -> tuple[Network, Params, float]:
    """Return the decoder of a checkpoint, the parameters of its autoencoder in float32, and its scaling factor."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    _, decoder, shapes = autoencoder(config)
    return decoder, read_weights(open_part(folder, "vae"), shapes, jnp.float32), config["scaling_factor"]


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


def on_both_cores(devices: int = 2) -> Mesh:
    """Return a mesh of this many simulated devices; to be called before anything else is computed."""
    jax.config.update("jax_num_cpu_devices", devices)
    return Mesh(np.array(jax.devices()), ("batch",))


def stratified_timesteps(key: jax.Array, count: int, steps: int) -> jax.Array:
    """Return timesteps that are spread evenly, each random within its share, `(count,) int32` below `steps`."""
    return ((jnp.arange(count) + jax.random.uniform(key, (count,))) / count * steps).astype(jnp.int32)


def write_index(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Write `model_index.json` and the scheduler's config of a Stable Diffusion checkpoint."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
