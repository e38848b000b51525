"""A convolution of 3 × 3 as one kernel on a TPU, with what stands around it in a residual block.

A norm's scale and shift and an activation go in front of it, the bias, a time embedding and a shortcut behind it, and
the sums for the next norm come out of it, so that an image is read once and written once. Images are NHWC. The lanes of
a TPU hold channels and its sublanes a row of pixels, so a batch of one fills it as well as a batch of eight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.projection_kernel import dot
from sdtpu_worker.models.sums_kernel import add_up
from sdtpu_worker.models.vector_memory import vector_memory


class Block(NamedTuple):
    """What one step of the kernel makes: rows of the input's image, and features of the output."""

    rows: int
    features: int


@dataclass(frozen=True)
class _Plan:
    """What is fixed when the kernel is traced."""

    rows: int
    last_block: int
    activation: Callable[[jax.Array], jax.Array] | None
    has_norm: bool
    shortcut: str  # "" for none, "image", or "product" for one that a 1 × 1 convolution makes
    doubles: bool
    dtype: Any


def convolve(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    block: Block,
    *,
    norm: tuple[jax.Array, jax.Array] | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    shortcut: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    doubles: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return a convolution with one pixel of zeros around the image, and the sums of what it gives.

    Args:
        x: `(B, h, w, C)`.
        weight: `(3, 3, C, N)`.
        bias: `(B, N) float32`.
        block: its rows divide h, its features N.
        norm: the scale and the shift of each channel of `x`, `(B, C) float32` each.
        activation: of the convolution's input, after the norm.
        shortcut: what is added: an image `(B, h, w, N)`, or an image `(B, h, w, S)` and the weight `(S, N)` of a dense
            layer over it.
        doubles: the image is enlarged first, to twice its sides, by repeating pixels. Of the nine products of an output
            pixel four are left, since the others meet the same pixels.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, h, w, N)` in the dtype of `x`, or twice as high and wide; and `(B, 2, N) float32`, for each channel the sum
        of all pixels and of their squares.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest as it was, without a word.
    """
    batch, height, width, channels = x.shape
    features = weight.shape[-1]
    if height % block.rows or features % block.features:
        raise ValueError(f"block {tuple(block)} must divide {height} rows and {features} features")
    operands = _operands(x, weight.astype(x.dtype), bias, block, norm, shortcut)
    kind = "product" if isinstance(shortcut, tuple) else "" if shortcut is None else "image"
    plan = _Plan(block.rows, height // block.rows - 1, activation, norm is not None, kind, doubles, x.dtype)

    times = 2 if doubles else 1
    image = jax.ShapeDtypeStruct((batch, times * height, times * width, features), x.dtype)
    of_image = pl.BlockSpec(
        (1, times * block.rows, times * width, block.features), lambda n, b, i: (b, i, 0, n)
    )  # fmt: skip
    of_sums = pl.BlockSpec((1, 2, block.features), lambda n, b, i: (b, 0, n))
    # The rows with their two neighbours are kept three times, not fetched ahead; counted like a block, they leave room.
    shifted = (3, block.rows + 2, width, channels), x.dtype
    folded = [((2, 2, 2, 2, channels, block.features), x.dtype)] * doubles
    blocks = [
        shifted,
        *folded,
        (of_image.block_shape, x.dtype),
        *((spec.block_shape, each.dtype) for each, spec in operands),
    ]
    memory = vector_memory(blocks, block.rows * width * block.features)
    products = (16 if doubles else 9) * channels + (shortcut[0].shape[-1] if isinstance(shortcut, tuple) else 0)
    flops = 2 * batch * height * width * products * features
    out, sums = pl.pallas_call(
        partial(_kernel, plan),
        grid=(features // block.features, batch, plan.last_block + 1),
        in_specs=[spec for _, spec in operands],
        out_specs=[of_image, of_sums],
        out_shape=[image, jax.ShapeDtypeStruct((batch, 2, features), jnp.float32)],
        cost_estimate=kernel_cost(
            flops, [image, x, *(each for each, _ in operands[3:])], x.size if activation is not None else 0
        ),
        scratch_shapes=[pltpu.VMEM(*each) for each in (shifted, *folded)],
        compiler_params=pltpu.CompilerParams(
            # Folded weights stay from the first image on, so that images must follow each other on the same core.
            dimension_semantics=("parallel", "arbitrary" if doubles else "parallel", "arbitrary"),
            vmem_limit_bytes=memory,
        ),
        interpret=interpret,
        name="doubling_convolution" if doubles else "convolution",
    )(*(each for each, _ in operands))
    return out, sums


def _operands(
    x: jax.Array, taps: jax.Array, bias: jax.Array, block: Block, norm: Any, shortcut: Any
) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """Return what the kernel reads, in its order, and the part that a step reads, by its features, image and rows."""
    _, height, width, channels = x.shape

    def rows(count: int, first: Callable[[jax.Array], jax.Array], depth: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, count, width, depth), lambda n, b, i: (b, first(i), 0, 0))

    def same(i: jax.Array) -> jax.Array:
        return i

    def features_of(array: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        zeros = (0,) * (array.ndim - 1)
        return array, pl.BlockSpec((*array.shape[:-1], block.features), lambda n, b, i: (*zeros, n))

    found = [
        (x, rows(block.rows, same, channels)),
        (x, rows(1, lambda i: jnp.maximum(i * block.rows - 1, 0), channels)),
        (x, rows(1, lambda i: jnp.minimum((i + 1) * block.rows, height - 1), channels)),
        features_of(taps),
        (bias.astype(jnp.float32)[:, None], pl.BlockSpec((1, 1, block.features), lambda n, b, i: (b, 0, n))),
    ]
    for each in norm or ():
        found.append((each.astype(jnp.float32)[:, None], pl.BlockSpec((1, 1, channels), lambda n, b, i: (b, 0, 0))))
    if isinstance(shortcut, tuple):
        image, weight = shortcut
        found += [(image, rows(block.rows, same, image.shape[-1])), features_of(weight.astype(x.dtype))]
    elif shortcut is not None:
        of_features = pl.BlockSpec((1, block.rows, width, block.features), lambda n, b, i: (b, i, 0, n))
        found.append((shortcut, of_features))
    return found


def _kernel(plan: _Plan, x_ref: Any, above_ref: Any, below_ref: Any, taps_ref: Any, bias_ref: Any, *more: Any) -> None:
    """Do it for a block of rows; all rows stand in straight code, so that products run beside the next norm."""
    refs = list(more)
    scale, shift = (refs.pop(0)[0], refs.pop(0)[0]) if plan.has_norm else (None, None)
    shortcut = [refs.pop(0) for _ in range({"": 0, "image": 1, "product": 2}[plan.shortcut])]
    out_ref, sums_ref, shifted, *folded = refs
    i = pl.program_id(2)
    if folded:
        pl.when((pl.program_id(1) == 0) & (i == 0))(partial(_fold, taps_ref, folded[0]))

    def prepare(pixels: jax.Array) -> jax.Array:
        y = pixels.astype(jnp.float32)
        y = y if scale is None else y * scale + shift
        return y if plan.activation is None else plan.activation(y)

    _put(shifted, 0, jnp.where(i > 0, prepare(above_ref[0, 0]), 0.0))
    for row in range(plan.rows):
        _put(shifted, row + 1, prepare(x_ref[0, row]))
    _put(shifted, plan.rows + 1, jnp.where(i < plan.last_block, prepare(below_ref[0, 0]), 0.0))

    if plan.doubles:
        total, squares = _double(plan, shifted, folded[0], bias_ref[0], out_ref)
    else:
        y = bias_ref[0] + sum(dot(_rows(shifted, x, y, plan.rows), taps_ref[y, x]) for y in range(3) for x in range(3))
        if plan.shortcut:
            beside = shortcut[0][0].reshape(-1, shortcut[0].shape[-1])
            y += dot(beside, shortcut[1][...]) if plan.shortcut == "product" else beside.astype(jnp.float32)
        out_ref[0] = y.astype(plan.dtype).reshape(out_ref.shape[1:])
        total, squares = _sums(y)
    found = jnp.concatenate([total, squares])
    add_up(sums_ref, 0, found, i)


def _put(shifted: Any, row: int, y: jax.Array) -> None:
    """Write a row of pixels `(w, C)` three times: moved to the right, as it is, and moved to the left."""
    width = y.shape[0]
    pixel = jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    before = jnp.where(pixel == 0, 0.0, pltpu.roll(y, 1, 0))
    after = jnp.where(pixel == width - 1, 0.0, pltpu.roll(y, width - 1, 0))
    for x, each in enumerate((before, y, after)):
        shifted[x, row] = each.astype(shifted.dtype)


def _rows(shifted: Any, x: int, y: int, rows: int) -> jax.Array:
    """Return the pixels that one place of the kernel meets, `(rows · w, C)`."""
    found: jax.Array = shifted[x, y : y + rows]
    return found.reshape(-1, found.shape[-1])


def _double(plan: _Plan, shifted: Any, taps: Any, bias: jax.Array, out_ref: Any) -> tuple[Any, Any]:
    """Write the enlarged image; of each pixel of the input come two rows of two pixels."""
    total: Any = 0.0
    squares: Any = 0.0
    for down in range(2):
        pair = []
        for right in range(2):
            y = bias + sum(
                dot(_rows(shifted, right + q, down + p, plan.rows), taps[down, right, p, q])
                for p in range(2)
                for q in range(2)
            )
            pair.append(y)
            of_phase = _sums(y)
            total, squares = total + of_phase[0], squares + of_phase[1]
        both = _interleave(pair[0], pair[1], plan.dtype).reshape(plan.rows, *out_ref.shape[2:])
        for row in range(plan.rows):
            out_ref[0, 2 * row + down] = both[row]
    return total, squares


def _interleave(even: jax.Array, odd: jax.Array, dtype: Any) -> jax.Array:
    """Return pixels of two arrays `(n, N) float32` in turn, `(2 n, N)`."""
    if dtype == jnp.bfloat16:
        # Two neighbours of bfloat16 share one word of the vector memory, so that nothing has to move.
        low, high = (
            pltpu.bitcast(each.astype(dtype).astype(jnp.float32), jnp.uint32) for each in (even, odd)
        )  # of a number in bfloat16 the upper half of the float32 is left
        return pltpu.bitcast((low >> 16) | high, dtype)
    return jnp.stack([even, odd], axis=1).reshape(-1, even.shape[-1]).astype(dtype)


def _sums(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y.sum(0, keepdims=True), jnp.square(y).sum(0, keepdims=True)


_MET = (((0,), (1, 2)), ((0, 1), (2,)))
"""Which of three places in a row meet the same pixel: for the first and the second of two pixels that come of one."""


def _fold(taps: Any, folded: Any) -> None:
    """Write the weights of an enlarging convolution, `(2, 2, 2, 2, C, N)`: phases down and right, then places."""
    channels, both = taps.shape[2], (0, 1)
    count = next(count for count in (32, 16, channels) if channels % count == 0)

    def fold(i: jax.Array, _: None) -> None:
        some = pl.ds(pl.multiple_of(i * count, count), count)
        wide = [[taps[y, x, some].astype(jnp.float32) for x in range(3)] for y in range(3)]
        for down, p in itertools.product(both, both):
            row = [sum(wide[y][x] for y in _MET[down][p]) for x in range(3)]
            for right, q in itertools.product(both, both):
                tap: Any = sum(row[x] for x in _MET[right][q])
                folded[down, right, p, q, some] = tap.astype(folded.dtype)

    jax.lax.fori_loop(0, channels // count, fold, None)
