"""The transformer of CLIP, for text and for images."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from sdtpu_worker.models.attention import attention, merge_heads, split_heads
from sdtpu_worker.models.layers import ACTIVATIONS, LayerNorm, Linear


class ClipAttention(nnx.Module):
    """Attention with its four projections, under transformers' names."""

    def __init__(self, features: int, heads: int, causal: bool) -> None:
        self.q_proj = Linear(features, features)
        self.k_proj = Linear(features, features)
        self.v_proj = Linear(features, features)
        self.out_proj = Linear(features, features)
        self.heads = heads
        self.causal = causal

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, L, features)` to the same shape."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v, self.causal)))


class ClipMlp(nnx.Module):
    """Two dense layers."""

    def __init__(self, features: int, inner_features: int, hidden_act: str) -> None:
        self.fc1 = Linear(features, inner_features)
        self.fc2 = Linear(inner_features, features)
        self.activation = ACTIVATIONS[hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, L, features)` to the same shape."""
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nnx.Module):
    """Attention, then dense layers; each after a norm and beside a shortcut.

    Args:
        config: a `ClipTextConfig` or `ClipVisionConfig`.
        causal: a position sees only what stands before it.
    """

    def __init__(self, config: Any, causal: bool) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = ClipAttention(config.hidden_size, config.num_attention_heads, causal)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ClipMlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, L, features)` to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nnx.Module):
    """A stack of layers."""

    def __init__(self, config: Any, causal: bool) -> None:
        self.layers = nnx.List([ClipLayer(config, causal) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Return the input `(B, L, features)` and what each layer made of it."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states
