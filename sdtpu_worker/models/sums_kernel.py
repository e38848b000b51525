"""The sums that a group norm needs, by one look at an image, as a kernel on a TPU.

XLA lays a batch of eight rows into the eight sublanes, and channels into the lanes. Each pixel is then a row of whole
tiles, and the sums by channel are sums of tiles: an addition, a square and another addition for each, about a cycle.
XLA's own reductions take about seventeen cycles for a tile, and a norm needs two of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost

_SUBLANES = 16  # of a tile of bfloat16


def sum_channels(x: jax.Array, block_pixels: int, *, interpret: bool = False) -> jax.Array:
    """Return what `layers.channel_sums` returns: for each channel the sum of all pixels and of their squares.

    Args:
        x: `(B, h, w, C)`, B such that some whole number of pixels fills 16 sublanes.
        block_pixels: how many of the h · w pixels one step of the kernel takes.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, 2, C) float32`.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest out, without a word.
    """
    batch, height, width, channels = x.shape
    at_once = max(1, _SUBLANES // batch)
    if height * width % block_pixels or block_pixels % at_once:
        raise ValueError(
            f"block_pixels must divide {height * width} pixels and be a multiple of {at_once}, got {block_pixels}"
        )

    def kernel(x_ref: Any, sums_ref: Any) -> None:
        total = squares = jnp.zeros((at_once * batch, channels), jnp.float32)
        for first in range(0, block_pixels, at_once):
            wide = x_ref[first : first + at_once].reshape(total.shape).astype(jnp.float32)
            total, squares = total + wide, squares + wide * wide
        found = jnp.stack([each.reshape(at_once, batch, channels).sum(0) for each in (total, squares)])
        add_up(sums_ref, ..., found, pl.program_id(0))

    made = jax.ShapeDtypeStruct((2, batch, channels), jnp.float32)
    sums: jax.Array = pl.pallas_call(
        kernel,
        grid=(height * width // block_pixels,),
        in_specs=[pl.BlockSpec((block_pixels, batch, channels), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((2, batch, channels), lambda i: (0, 0, 0)),
        out_shape=made,
        cost_estimate=kernel_cost(3 * x.size, [x, made]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="channel_sums",
    )(pixels_first(x))
    return sums.transpose(1, 0, 2)


def batch_in_sublanes(batch: int) -> bool:
    """Return whether XLA's convolutions lay a batch of so many rows into the eight sublanes."""
    return batch % 8 == 0


def pixels_first(image: jax.Array) -> jax.Array:
    """Return an image `(B, h, w, C)` as `(h · w, B, C)`, which is how XLA's convolutions of eight rows lay it out."""
    batch, height, width, channels = image.shape
    return image.transpose(1, 2, 0, 3).reshape(height * width, batch, channels)


def add_up(sums_ref: Any, place: Any, found: jax.Array, step: jax.Array) -> None:
    """Write at a place of a kernel's result what its first step found, and add to it what later steps find."""
    pl.when(step == 0)(lambda: sums_ref.__setitem__(place, found))
    pl.when(step > 0)(lambda: sums_ref.__setitem__(place, sums_ref[place] + found))
