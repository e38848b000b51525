"""The safety checker of Stable Diffusion: CLIP's image encoder, and the cosine to a few fixed concepts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.clip_encoder import ClipEncoder
from sdtpu_worker.models.layers import Conv, Embedding, LayerNorm, Linear, parameter

_NUM_CONCEPTS, _NUM_SPECIAL_CARE = 17, 3
_SPECIAL_CARE_ADJUSTMENT = 0.01  # how much stricter the concepts are in an image that needs special care


class VisionEmbeddings(nnx.Module):
    """An image's patches and one vector for the whole, with their positions."""

    def __init__(self, config: Any) -> None:
        self.class_embedding = parameter((config.hidden_size,))
        self.patch_embedding = Conv(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, padding=0, bias=False
        )
        self.position_embedding = Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Map `(B, H, W, 3)` to `(B, 1 + patches, E)`."""
        patches = self.patch_embedding(pixel_values)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        whole = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (len(patches), 1, patches.shape[-1]))
        positions = self.position_embedding.weight[...].astype(patches.dtype)
        return jnp.concatenate([whole, patches], axis=1) + positions


class VisionTransformer(nnx.Module):
    """CLIP's image encoder without its projection."""

    def __init__(self, config: Any) -> None:
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # the tensors are spelled so
        self.encoder = ClipEncoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Map `(B, H, W, 3)` to the pooled state `(B, E)`."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return self.post_layernorm(states[-1][:, 0])


class VisionModel(nnx.Module):
    """Holds the encoder, for one more level in the names of its parameters."""

    def __init__(self, config: Any) -> None:
        self.vision_model = VisionTransformer(config)


class SafetyChecker(nnx.Module):
    """diffusers' `StableDiffusionSafetyChecker`.

    Args:
        config: of `configs.read_safety_checker_config`.
    """

    def __init__(self, config: Any) -> None:
        vision, features = config.vision_config, config.projection_dim
        self.vision_model = VisionModel(vision)
        self.visual_projection = Linear(vision.hidden_size, features, bias=False)
        self.concept_embeds = parameter((_NUM_CONCEPTS, features))
        self.special_care_embeds = parameter((_NUM_SPECIAL_CARE, features))
        self.concept_embeds_weights = parameter((_NUM_CONCEPTS,))
        self.special_care_embeds_weights = parameter((_NUM_SPECIAL_CARE,))

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Return which images show what the checker looks for.

        The scores are rounded to three decimals before they are compared, in float32: thresholds are as close as 0.001.

        Args:
            pixel_values: of the checker's image processor, `(B, H, W, 3)`.

        Returns:
            `(B,) bool`.
        """
        dtype = self.visual_projection.weight.dtype
        embeds = self.visual_projection(self.vision_model.vision_model(pixel_values.astype(dtype)))
        special = _cosines(embeds, self.special_care_embeds) - self.special_care_embeds_weights[...].astype(jnp.float32)
        needs_care = (jnp.round(special, 3) > 0).any(-1, keepdims=True)
        scores = _cosines(embeds, self.concept_embeds) - self.concept_embeds_weights[...].astype(jnp.float32)
        scores = scores + jnp.where(needs_care, jnp.float32(_SPECIAL_CARE_ADJUSTMENT), jnp.float32(0))
        return (jnp.round(scores, 3) > 0).any(-1)


def _cosines(embeds: jax.Array, concepts: Any) -> jax.Array:
    """Return the cosine of each of `(B, P)` to each of `(N, P)`, `(B, N) float32`."""
    return _unit(embeds) @ _unit(concepts[...]).T


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
