"""Products at the borders of a transformer, as kernels on a TPU: what XLA would do around them goes with them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.layers import normalise
from sdtpu_worker.models.sums_kernel import add_up, pixels_first
from sdtpu_worker.models.vector_memory import vector_memory

dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def normalise_and_project(
    x: jax.Array,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
    block_rows: int,
    interpret: bool = False,
) -> jax.Array:
    """Return `norm(x) @ weight + bias`; XLA would look at `x` once more for the norm's variance.

    Args:
        x: `(B, L, C)`.
        norm_weight, norm_bias: `(C,)`, of the norm over the last axis.
        weight: `(C, N)`.
        bias: `(N,)`.
        eps: of the norm.
        block_rows: how many of the B · L rows one step of the kernel takes.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, L, N)` in the dtype of `x`.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest as it was, without a word.
    """
    features, made = weight.shape
    flat = x.reshape(-1, features)
    if len(flat) % block_rows:
        raise ValueError(f"block_rows must divide {len(flat)} rows, got {block_rows}")

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((block_rows, width), lambda i: (i, 0))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0, 0))

    norm_row, norm_bias_row, bias_row = (each.astype(jnp.float32)[None] for each in (norm_weight, norm_bias, bias))
    fixed = norm_row, norm_bias_row, weight.astype(x.dtype), bias_row
    blocks = [(shape, x.dtype) for shape in ((block_rows, features), weight.shape, (block_rows, made))]
    memory = vector_memory(blocks, block_rows * made)
    result = jax.ShapeDtypeStruct((len(flat), made), x.dtype)
    out: jax.Array = pl.pallas_call(
        partial(_normalise_and_project, eps=eps),
        grid=(len(flat) // block_rows,),
        in_specs=[block(features), *map(whole, fixed)],
        out_specs=block(made),
        out_shape=result,
        cost_estimate=kernel_cost(2 * len(flat) * weight.size, [flat, *fixed, result]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=memory),
        interpret=interpret,
        name="projection",
    )(flat, *fixed)
    return out.reshape(*x.shape[:-1], made)


def _normalise_and_project(
    x_ref: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, out_ref: Any, *, eps: float
) -> None:
    x = x_ref[...].astype(jnp.float32)
    normed = normalise(x, norm_weight[...], norm_bias[...], eps).astype(x_ref.dtype)
    out_ref[...] = (dot(normed, weight[...]) + bias[...]).astype(out_ref.dtype)


def project_from_image(
    image: jax.Array,
    affine: tuple[jax.Array, jax.Array],
    weight: jax.Array,
    bias: jax.Array,
    block_pixels: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return `(image · scale + shift) @ weight + bias`, as a transformer wants it; see `project_to_image`.

    Args:
        image: `(B, h, w, C)`.
        affine: the scale and the shift of each channel, `(B, C) float32` each: a norm.
        weight: `(C, N)`.
        bias: `(N,)`.
        block_pixels: how many of the h · w pixels one step of the kernel takes, of all rows of the batch.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, h · w, N)` in the dtype of the image.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest as it was, without a word.
    """
    turned, (pixels, batch, channels) = _turn(image, block_pixels)
    made = weight.shape[-1]
    result = jax.ShapeDtypeStruct((batch, pixels, made), image.dtype)
    of_batch = pl.BlockSpec((batch, channels), lambda i: (0, 0))
    out: jax.Array = pl.pallas_call(
        _project_from_image,
        grid=(pixels // block_pixels,),
        in_specs=[
            pl.BlockSpec((block_pixels, batch, channels), lambda i: (i, 0, 0)),
            of_batch,
            of_batch,
            pl.BlockSpec(weight.shape, lambda i: (0, 0)),
            pl.BlockSpec((1, made), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((batch, block_pixels, made), lambda i: (0, i, 0)),
        out_shape=result,
        cost_estimate=kernel_cost(2 * batch * pixels * weight.size, [image, weight, result]),
        compiler_params=_parameters("parallel", batch * block_pixels, (channels, made), weight, image.dtype),
        interpret=interpret,
        name="projection_from_image",
    )(turned, *affine, weight.astype(image.dtype), bias.astype(jnp.float32)[None])
    return out


def _project_from_image(image_ref: Any, scale: Any, shift: Any, weight: Any, bias: Any, out_ref: Any) -> None:
    pixels, batch, channels = image_ref.shape
    normed = image_ref[...].astype(jnp.float32) * scale[...] + shift[...]
    operand = normed.reshape(pixels * batch, channels).astype(image_ref.dtype)
    product = dot(operand, weight[...]) + bias[...]
    out_ref[...] = jnp.swapaxes(product.reshape(pixels, batch, -1), 0, 1).astype(out_ref.dtype)


def turn_image(image: jax.Array, block_pixels: int, *, interpret: bool = False) -> jax.Array:
    """Return an image `(B, h, w, C)` as it is, but laid out as XLA's convolutions of eight rows have it.

    XLA would rather bring what stands beside it to the other order, and then both to this one for a convolution.

    Args:
        image: of a kernel that has the pixels of one row of the batch in the sublanes.
        block_pixels: how many of the h · w pixels one step of the kernel takes, of all rows of the batch.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest as it was, without a word.
    """
    flat = flatten(image, block_pixels)
    batch, pixels, channels = flat.shape
    out = pl.pallas_call(
        _turn_image,
        grid=(pixels // block_pixels,),
        in_specs=[pl.BlockSpec((batch, block_pixels, channels), lambda i: (0, i, 0))],
        out_specs=pl.BlockSpec((block_pixels, batch, channels), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((pixels, batch, channels), image.dtype),
        cost_estimate=kernel_cost(0, [image, image]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="turn_image",
    )(flat)
    as_image = out.reshape(*image.shape[1:3], batch, channels).transpose(2, 0, 1, 3)
    turned: jax.Array = jax.lax.optimization_barrier(as_image)
    return turned


def _turn_image(image_ref: Any, out_ref: Any) -> None:
    out_ref[...] = jnp.swapaxes(image_ref[...].astype(jnp.float32), 0, 1).astype(out_ref.dtype)


def flatten(image: jax.Array, block_pixels: int) -> jax.Array:
    """Return an image `(B, h, w, C)` as `(B, h · w, C)`, once it is sure that blocks divide its pixels.

    Raises:
        ValueError: they do not.
    """
    batch, height, width, channels = image.shape
    if height * width % block_pixels:
        raise ValueError(f"block_pixels must divide {height * width} pixels, got {block_pixels}")
    return image.reshape(batch, height * width, channels)


def _turn(image: jax.Array, block_pixels: int) -> tuple[jax.Array, tuple[int, int, int]]:
    """Return an image `(h · w, B, C)` and its shape, once it is sure that blocks divide it."""
    turned = pixels_first(image)
    if len(turned) % block_pixels:
        raise ValueError(f"block_pixels must divide {len(turned)} pixels, got {block_pixels}")
    return turned, turned.shape


def _parameters(order: str, rows: int, widths: tuple[int, ...], weight: jax.Array, dtype: Any) -> pltpu.CompilerParams:
    """Return the parameters of a kernel with operands and results of so many rows in a block."""
    blocks = [((rows, width), dtype) for width in widths] + [(weight.shape, dtype)]
    memory = vector_memory(blocks, rows * weight.shape[-1])
    return pltpu.CompilerParams(dimension_semantics=(order,), vmem_limit_bytes=memory)


def project_to_image(
    y: jax.Array, weight: jax.Array, bias: jax.Array, image: jax.Array, block_pixels: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return an image with a product added to it, and its sums for the next norm.

    A transformer has the pixels of one row of the batch in the sublanes; XLA's convolutions of eight rows have the
    batch there. XLA copies between the two, and then looks at the copy for the sums. Here the product is turned on the
    chip, so that the image is written once, as convolutions want it.

    Args:
        y: `(B, h · w, C)`, what a transformer made.
        weight: `(C, N)`.
        bias: `(N,)`.
        image: `(B, h, w, N)`, the shortcut.
        block_pixels: how many of the h · w pixels one step of the kernel takes, of all rows of the batch.
        interpret: run the kernel in JAX's interpreter, on any platform.

    Returns:
        `(B, h, w, N)` in the dtype of `y`, and `(B, 2, N) float32`, for each channel the sum of all pixels and of their
        squares.

    Raises:
        ValueError: the block does not divide; a kernel would leave the rest as it was, without a word.
    """
    batch, height, width, made = image.shape
    features = y.shape[-1]
    turned, (pixels, *_) = _turn(image, block_pixels)
    of_image = pl.BlockSpec((block_pixels, batch, made), lambda i: (i, 0, 0))
    out, sums = pl.pallas_call(
        _project_to_image,
        grid=(pixels // block_pixels,),
        in_specs=[
            pl.BlockSpec((batch, block_pixels, features), lambda i: (0, i, 0)),
            pl.BlockSpec(weight.shape, lambda i: (0, 0)),
            pl.BlockSpec((1, made), lambda i: (0, 0)),
            of_image,
        ],
        out_specs=[of_image, pl.BlockSpec((2, batch, made), lambda i: (0, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(turned.shape, y.dtype),
            jax.ShapeDtypeStruct((2, batch, made), jnp.float32),
        ],
        cost_estimate=kernel_cost(2 * batch * pixels * weight.size, [y, weight, turned, turned]),
        compiler_params=_parameters("arbitrary", batch * block_pixels, (features, made, made), weight, y.dtype),
        interpret=interpret,
        name="projection_to_image",
    )(y, weight.astype(y.dtype), bias.astype(jnp.float32)[None], turned)
    made_image = out.reshape(height, width, batch, made).transpose(2, 0, 1, 3)
    # Without the barrier XLA may convert the whole image to float32 in memory for a norm, before it turns the axes.
    return jax.lax.optimization_barrier(made_image), sums.transpose(1, 0, 2)


def _project_to_image(y_ref: Any, weight: Any, bias: Any, image_ref: Any, out_ref: Any, sums_ref: Any) -> None:
    batch, pixels, features = y_ref.shape
    product = dot(y_ref[...].reshape(batch * pixels, features), weight[...]) + bias[...]
    turned = jnp.swapaxes(product.reshape(batch, pixels, -1), 0, 1)
    image = turned + image_ref[...].astype(jnp.float32)
    out_ref[...] = image.astype(out_ref.dtype)
    found = jnp.stack([image.sum(0), jnp.square(image).sum(0)])
    add_up(sums_ref, ..., found, pl.program_id(0))
