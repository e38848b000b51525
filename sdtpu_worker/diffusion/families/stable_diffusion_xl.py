"""Stable Diffusion XL: two CLIP text encoders, a UNet that is told sizes and a pooled prompt, an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.adapters import Adapted, Layers
from sdtpu_worker.diffusion.families.family import Arrays, Family, Params, Pictures, Shapes
from sdtpu_worker.diffusion.families.latent_unet import LatentUNet, linear_layers, transformer_layers
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.models.network import Network


@dataclass(frozen=True)
class StableDiffusionXL(LatentUNet):
    """Stable Diffusion XL and what is distilled from it.

    A job without a negative prompt has zeros in its place, as the checkpoints were trained (`zeroes_empty`).

    Attributes:
        text_encoder, text_encoder_2: the networks, whose parameters are the parts of these names.
        tokenizer, tokenizer_2: of the text encoders; they pad differently.
        width: E, of both text encoders' states side by side.
        layers: of the text encoder that has fewer.
        pooled_width: of the second encoder's pooled and projected state.
        zeroes_empty: an empty negative prompt counts as zeros, not as the encoding of an empty text.
    """

    text_encoder: Network
    text_encoder_2: Network
    tokenizer: PromptTokenizer
    tokenizer_2: PromptTokenizer
    width: int
    layers: int
    pooled_width: int
    zeroes_empty: bool

    @property
    def adapter_layers(self) -> Layers:
        """See `Family.adapter_layers`."""
        encoders = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {
            "unet": transformer_layers(self.unet),
            **{part: linear_layers(encoder) for part, encoder in encoders.items()},
        }

    def input_shapes(self) -> Shapes:
        """See `Family.input_shapes`."""
        return {
            "prompt_ids": jax.ShapeDtypeStruct((self.rows, self.tokenizer.length), jnp.int32),
            "prompt_ids_2": jax.ShapeDtypeStruct((self.rows, self.tokenizer_2.length), jnp.int32),
            "clip_skip": jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            "counts": jax.ShapeDtypeStruct((self.rows,), jnp.bool_),
            "time_ids": jax.ShapeDtypeStruct((6,), jnp.float32),
            **self._guidance_shapes(),
        }

    def make_inputs(self, request: GenerationRequest, size: Lane) -> tuple[dict[str, np.ndarray], bool]:
        """See `Family.make_inputs`."""
        self._check_guidance(request)
        self._check_pictures(request)
        prompts = self._prompts(request.prompt, request.negative_prompt)
        second = self._prompts(request.prompt_2 or request.prompt, request.negative_prompt_2 or request.negative_prompt)
        ids, truncated = self.tokenizer.encode(prompts)
        ids_2, truncated_2 = self.tokenizer_2.encode(second)
        sizes = request.original_size or size, request.crops_coords_top_left or (0, 0), request.target_size or size
        inputs = {
            "prompt_ids": ids,
            "prompt_ids_2": ids_2,
            "clip_skip": self._skip(request, self.layers),
            "counts": np.array([bool(a or b) or not self.zeroes_empty for a, b in zip(prompts, second, strict=True)]),
            "time_ids": np.array(sizes, np.float32).reshape(6),
            **self._guidance_inputs(request),
        }
        return inputs, truncated or truncated_2

    def conditioning_shapes(self, size: Lane) -> Shapes:
        """See `Family.conditioning_shapes`."""
        return {
            "context": jax.ShapeDtypeStruct((self.tokenizer.length, self.width), self.dtype),
            "text_embeds": jax.ShapeDtypeStruct((self.pooled_width,), self.dtype),
            "time_ids": jax.ShapeDtypeStruct((6,), jnp.float32),
            **self._guidance_shapes(),
            **self._picture_shapes(size),
        }

    def encode(
        self, params: Params, inputs: Arrays, pictures: Pictures | None, adapters: Adapted | None = None
    ) -> Arrays:
        """See `Family.encode`."""
        # The last layer's states are never used, and none of them has the final norm.
        skip = 1 + inputs["clip_skip"]
        parts = "text_encoder", "text_encoder_2"
        of_first, of_second = (None if adapters is None else adapters[part] for part in parts)
        first = self.text_encoder(params["text_encoder"], inputs["prompt_ids"], skip=skip, adapters=of_first)
        second = self.text_encoder_2(params["text_encoder_2"], inputs["prompt_ids_2"], skip=skip, adapters=of_second)
        context = jnp.concatenate([first.hidden_state, second.hidden_state], axis=-1)
        counts = inputs["counts"]
        return {
            "context": jnp.where(counts[:, None, None], context, 0),
            "text_embeds": jnp.where(counts[:, None], second.pooled, 0),
            "time_ids": jnp.stack([inputs["time_ids"]] * self.rows),
            **self._guidance_of(inputs),
            **self._picture_of(params, pictures),
        }

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
        more = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return self._ask_unet(params, latents, timesteps, conditioning, added, adapters, **more)


_: type[Family] = StableDiffusionXL  # mypy reports here what it lacks of the contract
