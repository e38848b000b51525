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
from sdtpu_worker.diffusion.families.family import WINDOWS, Arrays, Family, Params, Pictures, Shapes
from sdtpu_worker.diffusion.families.latent_unet import LatentUNet, linear_layers, transformer_layers
from sdtpu_worker.diffusion.families.text_windows import encode_windows, weigh, window_shapes
from sdtpu_worker.diffusion.prompt_inputs import Prompt
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
            **self._prompt_shapes({"": self.tokenizer.length, "_2": self.tokenizer_2.length}),
            "clip_skip": jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            "counts": jax.ShapeDtypeStruct((self.rows,), jnp.bool_),
            "time_ids": jax.ShapeDtypeStruct((6,), jnp.float32),
            **self._guidance_shapes(),
        }

    def make_inputs(self, request: GenerationRequest, size: Lane) -> tuple[dict[str, np.ndarray], bool]:
        """See `Family.make_inputs`."""
        self._check_guidance(request)
        self._check_pictures(request)
        prompt, negative = Prompt("prompt", request.prompt), Prompt("negative_prompt", request.negative_prompt)
        prompt_2, negative_2 = prompt, negative
        if request.prompt_2:
            prompt_2 = Prompt("prompt_2", request.prompt_2)
        if request.negative_prompt_2:
            negative_2 = Prompt("negative_prompt_2", request.negative_prompt_2)
        first = self._read_prompts(self.tokenizer, prompt, negative, request.prompt_syntax)
        second = self._read_prompts(self.tokenizer_2, prompt_2, negative_2, request.prompt_syntax)
        counts = [bool(negative.text or negative_2.text) or not self.zeroes_empty] * (self.rows - 1) + [True]
        sizes = request.original_size or size, request.crops_coords_top_left or (0, 0), request.target_size or size
        inputs = {
            "prompt_ids": first.ids,
            "prompt_ids_2": second.ids,
            "prompt_weights": first.weights,
            "prompt_weights_2": second.weights,
            **self._window_counts(np.maximum(first.counts, second.counts)),
            "clip_skip": self._skip(request, self.layers),
            "counts": np.array(counts),
            "time_ids": np.array(sizes, np.float32).reshape(6),
            **self._guidance_inputs(request),
        }
        return inputs, first.truncated or second.truncated

    def conditioning_shapes(self, size: Lane) -> Shapes:
        """See `Family.conditioning_shapes`."""
        return {
            **window_shapes(self.prompt_windows, self.tokenizer.length, self.width, self.dtype),
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
        counts = inputs["counts"]

        def encode(window: Arrays) -> tuple[jax.Array, jax.Array]:
            first = self.text_encoder(params[parts[0]], window["prompt_ids"], skip=skip, adapters=of_first)
            second = self.text_encoder_2(params[parts[1]], window["prompt_ids_2"], skip=skip, adapters=of_second)
            weighted = [
                weigh(first.hidden_state, window["prompt_weights"]),
                weigh(second.hidden_state, window["prompt_weights_2"]),
            ]
            context = jnp.concatenate(weighted, axis=-1)
            return jnp.where(counts[:, None, None], context, 0), jnp.where(counts[:, None], second.pooled, 0)

        windows = {name: inputs[name] for name in inputs if name.startswith("prompt_")}
        context, pooled = encode_windows(encode, windows, inputs.get(WINDOWS))
        return {
            **context,
            "text_embeds": pooled,
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
