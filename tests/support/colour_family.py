"""A family of twenty lines: what the programs ask of a model, with no network behind it."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.diffusion.adapters import Layers
from sdtpu_worker.diffusion.checkpoint import Checkpoint, Defaults
from sdtpu_worker.diffusion.families.family import Family, PictureUse
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from tests.support.checkpoints import STABLE_DIFFUSION_NOISE

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


class Colour:
    """A model that knows what every noisy latent is: the colour of the prompt; it has no network at all."""

    rows, follows_guidance_scale, picture_use, control_names = 2, True, PictureUse.NONE, ()
    adapter_layers: ClassVar[Layers] = {}
    latent_channels, scale_factor, size_multiple, default_size = 3, 1, 1, (4, 6)

    def input_shapes(self):
        return {"rgb": jax.ShapeDtypeStruct((2, 3), jnp.float32)}

    def make_inputs(self, request, size):
        return {"rgb": np.array([(0, 0, 0), COLOURS[request.prompt]], np.float32)}, False

    def conditioning_shapes(self, size):
        return {"rgb": jax.ShapeDtypeStruct((3,), jnp.float32)}

    def encode(self, params, inputs, pictures, adapters=None):
        return inputs

    def encode_image(self, params, image, noise):
        raise NotImplementedError("it takes no pictures")

    def control_shapes(self, size):
        return ()

    def embed_control(self, params, number, picture):
        raise NotImplementedError("it has no ControlNets")

    def control(self, params, number, latents, timesteps, conditioning, embedded):
        raise NotImplementedError("it has no ControlNets")

    def predict(self, params, latents, timesteps, conditioning, added, adapters=None):
        return jnp.broadcast_to(conditioning["rgb"][:, :, None, None], latents.shape)

    def decode(self, params, latents):
        return latents.transpose(1, 2, 0) * params["brush"]["strength"]

    def facts(self):
        return {"family": "colour"}


_: type[Family] = Colour


def colour_checkpoint(family: Family) -> Checkpoint:
    """Return a checkpoint of the family, with the parameters of `Colour`."""
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "DDIMScheduler",
            **STABLE_DIFFUSION_NOISE,
            "set_alpha_to_one": True,
            "prediction_type": "sample",
        }
    )
    params = {"brush": {"strength": np.ones(3, np.float32)}}
    return Checkpoint("colours", jnp.float32, family, params, schedule, Defaults("ddim", 50, 1.0), None)
