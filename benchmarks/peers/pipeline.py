"""`FlaxStableDiffusionPipeline` used as diffusers' documentation shows it; both peers run on it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxDDIMScheduler, FlaxStableDiffusionPipeline
from flax.jax_utils import replicate
from flax.training.common_utils import shard

GUIDANCE_SCALE = 7.5
STEP_COUNTS = (10, 20, 30, 50)
"""The step counts that have a program; `num_inference_steps` is static in the pipeline, so each compiles its own."""


@dataclass(frozen=True)
class Batch:
    """What one call of the pipeline made.

    Attributes:
        images: one PNG per prompt; the padding is dropped.
        rows: rows that the devices computed, padding included.
        device_s: seconds from the prompts to the pixels on the host.
    """

    images: list[bytes]
    rows: int
    device_s: float

    def result(self, index: int, uri: str) -> dict[str, Any]:
        """Return the JSON result of one prompt: where its image is, and how full the batch was."""
        return {
            "image": {"uri": uri, "bytes": len(self.images[index])},
            "batch": {"occupied": len(self.images), "rows": self.rows, "device_s": self.device_s},
        }


class Pipeline:
    """The pipeline with its parameters replicated over the first `num_devices` devices.

    With `PEERS_STEP_S` in the environment no call returns before `PEERS_EXTRA_STEPS` more than its steps could be done
    at that speed: devices of constant speed, as in `benchmarks/serving_constant_speed.py`.

    Args:
        num_devices: also the rows of a batch; fewer prompts are padded, since every call needs all of them.
        checkpoint: the folder; default: `PEERS_CHECKPOINT` in the environment.
    """

    def __init__(self, num_devices: int, checkpoint: str | None = None) -> None:
        self.num_devices = num_devices
        self.step_s = float(os.environ.get("PEERS_STEP_S", "0"))
        self.extra_steps = float(os.environ.get("PEERS_EXTRA_STEPS", "0"))
        self.pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
            checkpoint or os.environ["PEERS_CHECKPOINT"],
            safety_checker=None,
            feature_extractor=None,
            dtype=jnp.float32,
        )
        self.pipeline.scheduler = FlaxDDIMScheduler.from_config(self.pipeline.scheduler.config)
        params["scheduler"] = self.pipeline.scheduler.create_state()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float16 else leaf, params)
        self.params = replicate(params, jax.local_devices()[:num_devices])

    def warm(self) -> None:
        """Compile and really run the program of every step count."""
        for num_inference_steps in STEP_COUNTS:
            self.generate(["a red circle on a blue background"], [0], num_inference_steps)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int) -> Batch:
        """Generate one image per prompt; at most as many as there are devices."""
        started = time.monotonic()
        padding = self.num_devices - len(prompts)
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in [*seeds, *[seeds[-1]] * padding]])
        prompt_ids = self.pipeline.prepare_inputs([*prompts, *[prompts[-1]] * padding])
        pixels = self.pipeline(
            prompt_ids.reshape(self.num_devices, 1, -1) if self.num_devices == 1 else shard(prompt_ids),
            self.params,
            keys,
            num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            jit=True,
        ).images
        pixels = np.asarray(pixels.reshape((self.num_devices, *pixels.shape[-3:])))
        held_s = self.step_s * (num_inference_steps + self.extra_steps)
        time.sleep(max(0.0, started + held_s - time.monotonic()))
        device_s = time.monotonic() - started
        images = self.pipeline.numpy_to_pil(pixels[: len(prompts)])
        return Batch([_png(image) for image in images], self.num_devices, device_s)


def store_image(client: Any, task_id: str, data: bytes) -> str:
    """Put an image into Redis by its task id, to expire in a day; return its URI."""
    key = f"peers:image:{task_id}"
    client.set(key, data, ex=24 * 3600)
    return f"redis:{key}"


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
