"""Products at the borders of a transformer for fewer than eight rows of the batch, as kernels on a TPU.

The kernel of convolutions has the pixels of a row in the sublanes, and so has a transformer: nothing is turned here, as
it is in `projection_kernel`. What stands around a product goes with it: a norm, or a shortcut and the sums.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sdtpu_worker.models.kernel_cost import kernel_cost
from sdtpu_worker.models.projection_kernel import dot, flatten
from sdtpu_worker.models.sums_kernel import add_up
from sdtpu_worker.models.vector_memory import vector_memory


def project_rows_from_image(
    image: jax.Array,
    affine: tuple[jax.Array, jax.Array],
    weight: jax.Array,
    bias: jax.Array,
    block_pixels: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return what `projection_kernel.project_from_image` returns; one step takes the pixels of one row of the batch."""
    flat = flatten(image, block_pixels)
    made = jax.ShapeDtypeStruct((*flat.shape[:2], weight.shape[-1]), image.dtype)
    of_row = pl.BlockSpec((1, 1, flat.shape[2]), lambda b, i: (b, 0, 0))
    out: jax.Array = pl.pallas_call(
        _project_from_image,
        grid=(len(flat), flat.shape[1] // block_pixels),
        in_specs=[_pixels_of(flat, block_pixels), of_row, of_row, *_of_layer(weight)],
        out_specs=_pixels_of(made, block_pixels),
        out_shape=made,
        cost_estimate=kernel_cost(2 * flat[..., 0].size * weight.size, [flat, weight, made]),
        compiler_params=_parameters("parallel", block_pixels, [flat, made], weight),
        interpret=interpret,
        name="row_projection_from_image",
    )(flat, *(each[:, None] for each in affine), *_layer(weight, bias, image.dtype))
    return out


def _project_from_image(image_ref: Any, scale: Any, shift: Any, weight: Any, bias: Any, out_ref: Any) -> None:
    normed = image_ref[0].astype(jnp.float32) * scale[0] + shift[0]
    out_ref[0] = (dot(normed.astype(image_ref.dtype), weight[...]) + bias[...]).astype(out_ref.dtype)


def project_rows_to_image(
    y: jax.Array, weight: jax.Array, bias: jax.Array, image: jax.Array, block_pixels: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return what `projection_kernel.project_to_image` returns; one step takes the pixels of one row of the batch."""
    flat = flatten(image, block_pixels)
    batch, _, made = flat.shape
    out, sums = pl.pallas_call(
        _project_to_image,
        grid=(batch, flat.shape[1] // block_pixels),
        in_specs=[_pixels_of(y, block_pixels), *_of_layer(weight), _pixels_of(flat, block_pixels)],
        out_specs=[_pixels_of(flat, block_pixels), pl.BlockSpec((1, 2, made), lambda b, i: (b, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(flat.shape, y.dtype),
            jax.ShapeDtypeStruct((batch, 2, made), jnp.float32),
        ],
        cost_estimate=kernel_cost(2 * flat[..., 0].size * weight.size, [y, weight, flat, flat]),
        compiler_params=_parameters("arbitrary", block_pixels, [y, flat, flat], weight),
        interpret=interpret,
        name="row_projection_to_image",
    )(y, *_layer(weight, bias, y.dtype), flat)
    return out.reshape(image.shape), sums


def _project_to_image(y_ref: Any, weight: Any, bias: Any, image_ref: Any, out_ref: Any, sums_ref: Any) -> None:
    image = dot(y_ref[0], weight[...]) + bias[...] + image_ref[0].astype(jnp.float32)
    out_ref[0] = image.astype(out_ref.dtype)
    found = jnp.concatenate([image.sum(0, keepdims=True), jnp.square(image).sum(0, keepdims=True)])
    add_up(sums_ref, 0, found, pl.program_id(1))


def _pixels_of(array: Any, block_pixels: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, block_pixels, array.shape[2]), lambda b, i: (b, i, 0))


def _of_layer(weight: jax.Array) -> list[pl.BlockSpec]:
    return [pl.BlockSpec(shape, lambda b, i: (0, 0)) for shape in (weight.shape, (1, weight.shape[-1]))]


def _layer(weight: jax.Array, bias: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return weight.astype(dtype), bias.astype(jnp.float32)[None]


def _parameters(order: str, block_pixels: int, arrays: list[Any], weight: jax.Array) -> pltpu.CompilerParams:
    blocks = [((block_pixels, each.shape[2]), each.dtype) for each in arrays] + [(weight.shape, arrays[0].dtype)]
    memory = vector_memory(blocks, block_pixels * weight.shape[-1])
    return pltpu.CompilerParams(dimension_semantics=("parallel", order), vmem_limit_bytes=memory)
