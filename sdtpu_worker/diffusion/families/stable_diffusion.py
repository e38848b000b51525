"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional UNet, an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.families.family import Arrays, Family, Params, Shapes
from sdtpu_worker.diffusion.families.latent_unet import LatentUNet
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.models.network import Network


@dataclass(frozen=True)
class StableDiffusion(LatentUNet):
    """Stable Diffusion 1.x and 2.x.

    Attributes:
        text_encoder: the network, whose parameters are the part `text_encoder`.
        tokenizer: of the text encoder.
        width: E, of the text encoder's states.
    """

    text_encoder: Network
    tokenizer: PromptTokenizer
    width: int

    def input_shapes(self) -> Shapes:
        """See `Family.input_shapes`."""
        ids = jax.ShapeDtypeStruct((self.rows, self.tokenizer.length), jnp.int32)
        return {"prompt_ids": ids, **self._guidance_shapes()}

    def make_inputs(self, request: GenerationRequest, size: Lane) -> tuple[dict[str, np.ndarray], bool]:
        """See `Family.make_inputs`."""
        ids, truncated = self.tokenizer.encode(self._prompts(request.prompt, request.negative_prompt))
        return {"prompt_ids": ids, **self._guidance_inputs(request.guidance_scale)}, truncated

    def conditioning_shapes(self) -> Shapes:
        """See `Family.conditioning_shapes`."""
        context = jax.ShapeDtypeStruct((self.tokenizer.length, self.width), self.dtype)
        return {"context": context, **self._guidance_shapes()}

    def encode(self, params: Params, inputs: Arrays) -> Arrays:
        """See `Family.encode`."""
        states = self.text_encoder(params["text_encoder"], inputs["prompt_ids"])
        return {"context": states.last_hidden_state, **self._guidance_of(inputs)}

    def predict(self, params: Params, latents: jax.Array, timesteps: jax.Array, conditioning: Arrays) -> jax.Array:
        """See `Family.predict`."""
        return self._ask_unet(params, latents, timesteps, conditioning)


_: type[Family] = StableDiffusion  # mypy reports here what it lacks of the contract
