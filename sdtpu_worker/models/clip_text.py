"""CLIP's text encoder: OpenAI's CLIP-L, OpenCLIP's H and bigG, and any other size of the same build."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.clip_encoder import ClipEncoder
from sdtpu_worker.models.layers import Embedding, LayerNorm, Linear

_LEGACY_EOS = 2


class TextStates(NamedTuple):
    """What a text encoder makes of prompts.

    Attributes:
        last_hidden_state: `(B, L, E)`, with the final norm: what Stable Diffusion 1.x and 2.x take.
        hidden_state: the same without the final norm: what XL takes, with `skip=1`.
        pooled: `(B, P)`, the normed state of the last layer at the end of the text, projected if there is a
            projection; whatever `skip`.
    """

    last_hidden_state: jax.Array
    hidden_state: jax.Array
    pooled: jax.Array


class TextEmbeddings(nnx.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, config: Any) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Map `(B, L) int32` to `(B, L, E)`."""
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class TextTransformer(nnx.Module):
    """The encoder without its projection."""

    def __init__(self, config: Any) -> None:
        self.embeddings = TextEmbeddings(config)
        self.encoder = ClipEncoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id
        self.vocab_size = config.vocab_size

    def __call__(self, input_ids: jax.Array, skip: jax.Array | int) -> TextStates:
        """See `ClipTextEncoder`; `pooled` is not projected."""
        states = self.encoder(self.embeddings(input_ids))
        if self.eos_token_id == _LEGACY_EOS:
            # Configs of before 2023 say 2, which is no token's; their vocabularies end with the end of text. Ids of
            # words that were added to the table lie behind.
            is_end = jnp.where(input_ids < self.vocab_size, input_ids, 0)
        else:
            is_end = (input_ids == self.eos_token_id).astype(jnp.int32)
        last = self.final_layer_norm(states[-1])
        pooled = last[jnp.arange(len(input_ids)), jnp.argmax(is_end, axis=-1)]
        chosen = jnp.stack(states)[len(states) - 1 - skip, jnp.arange(len(input_ids))]
        return TextStates(self.final_layer_norm(chosen), chosen, pooled)


class ClipTextEncoder(nnx.Module):
    """transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection`.

    Args:
        config: a `ClipTextConfig`.
        projection: whether the pooled state is projected.
    """

    def __init__(self, config: Any, projection: bool) -> None:
        self.text_model = TextTransformer(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None

    def __call__(self, input_ids: jax.Array, skip: jax.Array | int = 0) -> TextStates:
        """Encode prompts.

        Args:
            input_ids: `(B, L) int32`.
            skip: `() int32` or `(B,) int32`, how many of the last layers are left out of the hidden states; it may be
                traced.

        Returns:
            States in the dtype of the parameters.
        """
        states = self.text_model(input_ids, skip)
        if self.text_projection is None:
            return states
        return states._replace(pooled=self.text_projection(states.pooled))
