"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional UNet, an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.adapters import Adapted, Layers
from sdtpu_worker.diffusion.families.family import WINDOWS, Arrays, Family, Params, Pictures, Shapes
from sdtpu_worker.diffusion.families.latent_unet import LatentUNet, linear_layers, transformer_layers
from sdtpu_worker.diffusion.families.text_windows import encode_windows, weigh, window_shapes
from sdtpu_worker.diffusion.prompt_inputs import Prompt
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.models.network import Network
from sdtpu_worker.redaction import brief

_OF_XL = ("prompt_2", "negative_prompt_2", "original_size", "target_size", "crops_coords_top_left")


@dataclass(frozen=True)
class StableDiffusion(LatentUNet):
    """Stable Diffusion 1.x and 2.x.

    Attributes:
        text_encoder: the network, whose parameters are the part `text_encoder`.
        tokenizer: of the text encoder.
        width: E, of the text encoder's states.
        layers: of the text encoder.
    """

    text_encoder: Network
    tokenizer: PromptTokenizer
    width: int
    layers: int

    @property
    def adapter_layers(self) -> Layers:
        """See `Family.adapter_layers`."""
        return {"unet": transformer_layers(self.unet), "text_encoder": linear_layers(self.text_encoder)}

    def input_shapes(self) -> Shapes:
        """See `Family.input_shapes`."""
        return {
            **self._prompt_shapes({"": self.tokenizer.length}),
            "clip_skip": jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            **self._guidance_shapes(),
        }

    def make_inputs(self, request: GenerationRequest, size: Lane) -> tuple[dict[str, np.ndarray], bool]:
        """See `Family.make_inputs`."""
        self._check_guidance(request)
        self._check_pictures(request)
        for name in _OF_XL:
            if getattr(request, name) is not None:
                raise InvalidRequest(
                    f"{name} must be left out: only a Stable Diffusion XL checkpoint can follow it, got"
                    f" {brief(getattr(request, name))}"
                )
        prompt, negative = Prompt("prompt", request.prompt), Prompt("negative_prompt", request.negative_prompt)
        words = self._read_prompts(self.tokenizer, prompt, negative, request.prompt_syntax)
        inputs = {
            "prompt_ids": words.ids,
            "prompt_weights": words.weights,
            **self._window_counts(words.counts),
            "clip_skip": self._skip(request, self.layers),
            **self._guidance_inputs(request),
        }
        return inputs, words.truncated

    def conditioning_shapes(self, size: Lane) -> Shapes:
        """See `Family.conditioning_shapes`."""
        context = window_shapes(self.prompt_windows, self.tokenizer.length, self.width, self.dtype)
        return {**context, **self._guidance_shapes(), **self._picture_shapes(size)}

    def encode(
        self, params: Params, inputs: Arrays, pictures: Pictures | None, adapters: Adapted | None = None
    ) -> Arrays:
        """See `Family.encode`."""

        def encode(window: Arrays) -> tuple[jax.Array, None]:
            states = self.text_encoder(
                params["text_encoder"],
                window["prompt_ids"],
                skip=inputs["clip_skip"],
                adapters=None if adapters is None else adapters["text_encoder"],
            )
            return weigh(states.last_hidden_state, window["prompt_weights"]), None

        windows = {name: inputs[name] for name in ("prompt_ids", "prompt_weights")}
        context, _ = encode_windows(encode, windows, inputs.get(WINDOWS))
        return {**context, **self._guidance_of(inputs), **self._picture_of(params, pictures)}

    def predict(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Arrays,
        added: Any,
        adapters: Adapted | None = None,
    ) -> jax.Array:
        """See `Family.predict`."""
        return self._ask_unet(params, latents, timesteps, conditioning, added, adapters)


_: type[Family] = StableDiffusion  # mypy reports here what it lacks of the contract
