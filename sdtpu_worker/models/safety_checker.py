"""The safety checker of Stable Diffusion 1.x: CLIP's image encoder, and what it must not come near."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.clip_text import Encoder
from sdtpu_worker.models.layers import Conv, Embedding, LayerNorm, Linear
from sdtpu_worker.models.network import parameter

_CONCEPTS, _SPECIAL_CARE = 17, 3
_CAUTION = 0.01


class SafetyChecker(nnx.Module):
    """Says which images come too near to one of seventeen concepts.

    Args:
        config: a `transformers.CLIPConfig`.
    """

    def __init__(self, config: Any) -> None:
        width = config.vision_config.hidden_size
        self.vision_model = VisionTower(config.vision_config)
        self.visual_projection = Linear(width, config.projection_dim, bias=False)
        self.concept_embeds = parameter(_CONCEPTS, config.projection_dim)
        self.special_care_embeds = parameter(_SPECIAL_CARE, config.projection_dim)
        self.concept_embeds_weights = parameter(_CONCEPTS)
        self.special_care_embeds_weights = parameter(_SPECIAL_CARE)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return `(B,) bool`, True for an image that must not be shown.

        Args:
            pixels: `(B, H, W, 3) float32`, as the checkpoint's image processor makes them.
        """
        embeds = self.visual_projection(self.vision_model(pixels))
        care = _cosines(embeds, self.special_care_embeds[...]) - self.special_care_embeds_weights[...]
        caution = jnp.any(jnp.round(care, 3) > 0, axis=1, keepdims=True) * _CAUTION
        scores = _cosines(embeds, self.concept_embeds[...]) - self.concept_embeds_weights[...] + caution
        return jnp.any(jnp.round(scores, 3) > 0, axis=1)


class VisionTower(nnx.Module):
    """The image encoder; the attribute of its own name is how PyTorch's checker names the parameters."""

    def __init__(self, config: Any) -> None:
        self.vision_model = VisionModel(config)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return the pooled state, `(B, E)`."""
        return self.vision_model(pixels)


class VisionModel(nnx.Module):
    """CLIP's image encoder."""

    def __init__(self, config: Any) -> None:
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return the state of the class token with the final norm, `(B, E)`."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class VisionEmbeddings(nnx.Module):
    """Patches, a class token before them, and their positions as vectors."""

    def __init__(self, config: Any) -> None:
        self.class_embedding = parameter(config.hidden_size)
        self.patch_embedding = Conv(3, config.hidden_size, config.patch_size, config.patch_size, padding=0, bias=False)
        count = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = Embedding(count, config.hidden_size)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return `(B, 1 + patches, E)` of `(B, H, W, 3)`."""
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(pixels.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (pixels.shape[0], 1, patches.shape[-1])
        )
        x = jnp.concatenate([first, patches], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))


def _cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine of every row of `a` with every row of `b`."""
    a = a / jnp.linalg.norm(a, axis=1, keepdims=True)
    b = b / jnp.linalg.norm(b, axis=1, keepdims=True)
    return a @ b.T
