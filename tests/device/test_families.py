"""A kind of model that nobody has heard of runs in the programs, slots and snapshots that serve Stable Diffusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import Checkpoint, Defaults
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from tests.support.checkpoints import STABLE_DIFFUSION_NOISE
from tests.support.engines import generate_all, run_alone

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


class Colour:
    """A model that knows what every noisy latent is: the colour of the prompt; it has no network at all."""

    is_guided, latent_channels, scale_factor, size_multiple, default_size = True, 3, 1, 1, (4, 6)

    def input_shapes(self):
        return {"rgb": jax.ShapeDtypeStruct((2, 3), jnp.float32)}

    def make_inputs(self, request, size):
        return {"rgb": np.array([(0, 0, 0), COLOURS[request.prompt]], np.float32)}, False

    def conditioning_shapes(self):
        return {"rgb": jax.ShapeDtypeStruct((3,), jnp.float32)}

    def encode(self, params, inputs):
        return inputs

    def predict(self, params, latents, timesteps, conditioning):
        return jnp.broadcast_to(conditioning["rgb"][:, :, None, None], latents.shape)

    def decode(self, params, latents):
        return latents.transpose(1, 2, 0) * params["brush"]["strength"]

    def facts(self):
        return {"family": "colour"}


_: type[Family] = Colour


@pytest.fixture(scope="module")
def colour_engine(devices):
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "DDIMScheduler",
            **STABLE_DIFFUSION_NOISE,
            "set_alpha_to_one": True,
            "prediction_type": "sample",
        }
    )
    checkpoint = Checkpoint("colours", jnp.float32, Colour(), {"brush": {"strength": np.ones(3, np.float32)}}, schedule,
                            Defaults("ddim", 50, 1.0), None)  # fmt: skip
    return Engine(checkpoint, devices[:2], 2)


def test_a_new_family_draws_parks_and_resumes_without_a_change_to_the_programs(colour_engine):
    requests = [GenerationRequest(name, seed=i, num_inference_steps=4 + i) for i, name in enumerate(COLOURS)]
    images = generate_all(colour_engine, requests)
    for image, rgb in zip(images, COLOURS.values(), strict=True):
        assert image.pixels.shape == (4, 6, 3)
        assert np.abs(image.pixels / 127.5 - 1 - np.array(rgb)).max() < 0.01
    job = colour_engine.prepare("it", requests[0])
    reference = run_alone(colour_engine, job, 0, 0, [4]).pixels
    run_alone(colour_engine, job, 0, 1, [2])
    snapshot = colour_engine.read_snapshot(colour_engine.snapshot(job.lane, 0, 1).to_bytes(), job)
    assert snapshot.step == 2
    np.testing.assert_array_equal(reference, images[0].pixels)
