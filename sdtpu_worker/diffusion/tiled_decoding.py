"""Decode a large image in tiles, one after the other: the memory of one tile is all that the decoder then needs.

A decoder looks at a neighbourhood of each pixel, and at the statistics of all of them (group norms, the attention in
its middle). Tiles overlap, and each fades out where the next begins, so that the second does not show as seams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_LATENTS = 64
"""Side of a tile in latents: what Stable Diffusion 1.x was trained on."""
_OVERLAP = 0.25


def tile_side(height: int, width: int) -> int:
    """Return the side of a tile, in latents, for latents of this size: 64, or half of the longer side if that is less.

    A side that is shorter than the tile's is not cut.
    """
    return min(MOST_LATENTS, math.ceil(max(height, width) / 2))


def decode_in_tiles(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, side: int, scale_factor: int
) -> jax.Array:
    """Return an image of latents.

    Args:
        decode: maps `(C, y, x)` to `(y * scale_factor, x * scale_factor, 3) float32`.
        latents: `(C, h, w) float32`.
        side: of a tile, in latents.
        scale_factor: pixels per latent, along one side.

    Returns:
        `(h * scale_factor, w * scale_factor, 3) float32`.
    """
    channels, *sides = latents.shape
    tile = [min(side, each) for each in sides]
    starts = [_starts(each, of_tile) for each, of_tile in zip(sides, tile, strict=True)]
    weights = [
        _fade(at, each, of_tile, scale_factor) for at, each, of_tile in zip(starts, sides, tile, strict=True)
    ]  # fmt: skip
    corners = jnp.asarray([(y, x) for y in range(len(starts[0])) for x in range(len(starts[1]))], jnp.int32)
    tops, lefts = (jnp.asarray(each, jnp.int32) for each in starts)
    down, across = (jnp.asarray(each) for each in weights)

    def add(i: Any, image: jax.Array) -> jax.Array:
        row, column = corners[i]
        top, left = tops[row], lefts[column]
        part = decode(jax.lax.dynamic_slice(latents, (0, top, left), (channels, *tile)))
        part = part * down[row][:, None, None] * across[column][None, :, None]
        place = (top * scale_factor, left * scale_factor, 0)
        before = jax.lax.dynamic_slice(image, place, part.shape)
        return jax.lax.dynamic_update_slice(image, before + part, place)

    empty = jnp.zeros((sides[0] * scale_factor, sides[1] * scale_factor, 3), jnp.float32)
    return jax.lax.fori_loop(0, len(corners), add, empty)


def _starts(side: int, tile: int) -> list[int]:
    """Return where tiles begin: the first at 0, the last at the end, the others evenly between, a quarter over each."""
    count = 1 + math.ceil((side - tile) / (tile * (1 - _OVERLAP))) if side > tile else 1
    return [round(i * (side - tile) / max(1, count - 1)) for i in range(count)]


def _fade(starts: list[int], side: int, tile: int, scale_factor: int) -> np.ndarray:
    """Return what counts of every tile along one side, `(tiles, tile * scale_factor) float32`; together 1 everywhere.

    A tile counts the more the farther a pixel is from the edge that it shares with a neighbour.
    """
    length = tile * scale_factor
    weights = np.zeros((len(starts), side * scale_factor))
    for row, start in enumerate(starts):
        rising = np.arange(length) + 0.5 if row > 0 else np.full(length, float(length))
        falling = length - np.arange(length) - 0.5 if row < len(starts) - 1 else np.full(length, float(length))
        overlap = length - scale_factor * max(np.diff(starts), default=0)
        weights[row, start * scale_factor : start * scale_factor + length] = np.minimum(
            np.minimum(rising, falling), max(overlap, 1)
        )
    weights /= weights.sum(axis=0)
    places = [slice(start * scale_factor, start * scale_factor + length) for start in starts]
    return np.stack([row[place] for row, place in zip(weights, places, strict=True)]).astype(np.float32)
