"""CLIP's text encoders: CLIP-L, OpenCLIP-H and OpenCLIP-bigG, with or without a projection of the pooled state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.attention import attention
from sdtpu_worker.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear


class TextStates(NamedTuple):
    """What a text encoder makes of token ids.

    Attributes:
        hidden_states: `(layers + 1, B, L, E)`, the first one the embeddings; without the final norm.
        last_hidden_state: `(B, L, E)`, of the last layer, with the final norm.
        pooled: `(B, E)`, the state at the end of the text; `(B, P)` with a projection.
    """

    hidden_states: jax.Array
    last_hidden_state: jax.Array
    pooled: jax.Array


class CLIPTextModel(nnx.Module):
    """A text encoder.

    Args:
        config: a `transformers.CLIPTextConfig`.
        projection: whether the pooled state is projected (`CLIPTextModelWithProjection`).
    """

    def __init__(self, config: Any, projection: bool = False) -> None:
        self.text_model = TextModel(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None

    def __call__(self, ids: jax.Array) -> TextStates:
        """Return the states of `(B, L) int32`."""
        states = self.text_model(ids)
        if self.text_projection is None:
            return states
        return states._replace(pooled=self.text_projection(states.pooled))

    def normalise(self, states: jax.Array) -> jax.Array:
        """Return states without the final norm, `(B, L, E)`, with it."""
        return self.text_model.final_layer_norm(states)


class TextModel(nnx.Module):
    """The encoder without a projection."""

    def __init__(self, config: Any) -> None:
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self._eos_token_id = config.eos_token_id

    def __call__(self, ids: jax.Array) -> TextStates:
        """Return the states of `(B, L) int32`."""
        length = ids.shape[1]
        mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)
        hidden = [self.embeddings(ids)]
        for layer in self.encoder.layers:
            hidden.append(layer(hidden[-1], mask))
        last = self.final_layer_norm(hidden[-1])
        # Configs of before 2023 say 2 and mean the largest id, which was the end's.
        end = jnp.argmax(ids if self._eos_token_id == 2 else ids == self._eos_token_id, axis=-1)
        return TextStates(jnp.stack(hidden), last, last[jnp.arange(ids.shape[0]), end])


class Embeddings(nnx.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, config: Any) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return `(B, L, E)` of `(B, L) int32`."""
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class Encoder(nnx.Module):
    """The layers, in order."""

    def __init__(self, config: Any) -> None:
        self.layers = nnx.List([EncoderLayer(config) for _ in range(config.num_hidden_layers)])


class EncoderLayer(nnx.Module):
    """Attention, then two linear layers, each over a norm and beside the input."""

    def __init__(self, config: Any) -> None:
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return an array like `x`, `(B, L, E)`."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nnx.Module):
    """Attention as transformers' CLIP has it."""

    def __init__(self, width: int, heads: int) -> None:
        self.q_proj, self.k_proj, self.v_proj = Linear(width, width), Linear(width, width), Linear(width, width)
        self.out_proj = Linear(width, width)
        self._heads = heads

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return an array like `x`, `(B, L, E)`; position i sees no position after i where the mask says so."""
        query, key, value = (
            project(x).reshape(*x.shape[:2], self._heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(query, key, value, mask).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like `x`, `(…, width)`."""
        return self.fc2(self._activate(self.fc1(x)))
