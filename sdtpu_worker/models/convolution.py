"""Between layers of convolutions and their kernel on a TPU: when there is one, and what it takes of a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdtpu_worker.models.convolution_kernel import Block, convolve
from sdtpu_worker.models.layers import Activation, Conv, GroupNorm, channel_sums
from sdtpu_worker.models.projection_kernel import turn_image
from sdtpu_worker.models.selection import current_selection
from sdtpu_worker.models.sums_kernel import batch_in_sublanes, sum_channels


class Measured(NamedTuple):
    """An image on its way from layer to layer, with what the next norm wants to know of it.

    Attributes:
        image: `(B, h, w, C)`.
        sums: of `layers.channel_sums`, where the kernel that made the image has them, or one for sums; None elsewhere.
    """

    image: jax.Array
    sums: jax.Array | None = None

    def affine(self, norm: GroupNorm) -> tuple[jax.Array, jax.Array]:
        """Return the scale and the shift of each channel by which a norm normalises the image, `(B, C)` each."""
        sums = channel_sums(self.image) if self.sums is None else self.sums
        return norm.scale_and_shift(sums, self.image.shape[1] * self.image.shape[2])

    def normalised(self, norm: GroupNorm) -> jax.Array:
        """Return what a norm makes of the image, `(B, h, w, C)`.

        The sums count where images like this have a kernel for them. Of fewer than eight rows, whose
        convolutions are kernels, the image may have sums too, but two looks by XLA leave more on the chip there: a step
        of one slot of Stable Diffusion 1.5 on a v5e moves 1.85 GB with them, and 2.03 with the sums.
        """
        if self.sums is None or not _sums_block(self.image):
            return norm(self.image)
        scale, shift = (each[:, None, None] for each in self.affine(norm))
        return (self.image.astype(jnp.float32) * scale + shift).astype(self.image.dtype)

    def beside(self, other: Measured) -> Measured:
        """Return the channels of both images beside each other; what is known of both is known of the result."""
        image = jnp.concatenate([self.image, other.image], axis=-1)
        if self.sums is None or other.sums is None:
            return Measured(image)
        return Measured(image, jnp.concatenate([self.sums, other.sums], axis=-1))


def measure(image: jax.Array) -> Measured:
    """Return an image `(B, h, w, C)` with its sums, where there is a kernel for them.

    Whoever makes an image that may be normalised calls this: sums that nobody reads are not computed. An image that is
    normalised twice, on the way down and beside another on the way up, is looked at once.
    """
    block = _sums_block(image)
    return Measured(image, sum_channels(image, block, interpret=current_selection().interpret) if block else None)


def turn(x: Measured) -> Measured:
    """Return an image of the kernel of convolutions, laid out for convolutions of XLA where those are next."""
    block = projection_block(x.image)
    if not block or not batch_in_sublanes(len(x.image)):
        return x
    return Measured(turn_image(x.image, block, interpret=current_selection().interpret), x.sums)


def projection_block(image: jax.Array) -> int:
    """Return the pixels that a step of the kernels between convolutions and a transformer takes; 0 without them."""
    selection = current_selection()
    return selection.projection_block_pixels(selection.platform, selection.wanted, image.shape, image.dtype)


def _sums_block(image: jax.Array) -> int:
    selection = current_selection()
    return selection.sums_block_pixels(selection.platform, selection.wanted, image.shape, image.dtype)


def kernel_block(conv: Conv, x: jax.Array | jax.ShapeDtypeStruct, doubles: bool = False) -> Block | None:
    """Return what a step of the kernel takes of a layer's convolution of 3 × 3; None if there is no kernel for it.

    Args:
        conv: with a stride of 1 and one pixel of zeros around the image.
        x: its input `(B, h, w, C)`, or the shape and dtype of it.
        doubles: the image is enlarged first.
    """
    selection = current_selection()
    found = selection.convolution_block(
        selection.platform, selection.wanted, x.shape, conv.weight.shape[-1], doubles, x.dtype
    )
    return found and Block(*found)


def convolve_by_kernel(
    conv: Conv,
    x: jax.Array,
    norm: tuple[jax.Array, jax.Array] | None = None,
    activation: Activation | None = None,
    shortcut: Any = None,
    *,
    more_bias: jax.Array | None = None,
    doubles: bool = False,
) -> Measured:
    """Return what the kernel makes of a layer; `kernel_block` must have said that there is one.

    Args:
        conv, x, doubles: as for `kernel_block`.
        norm, activation, shortcut: as for `convolution_kernel.convolve`.
        more_bias: `(N,)` or `(B, N)`, added to the layer's own.
    """
    block = kernel_block(conv, x, doubles)
    assert block is not None
    bias = jnp.zeros((), jnp.float32) if conv.bias is None else conv.bias[...].astype(jnp.float32)
    if more_bias is not None:
        bias = bias + more_bias.astype(jnp.float32)
    bias = jnp.broadcast_to(bias, (x.shape[0], conv.weight.shape[-1]))
    made = convolve(
        x, conv.weight[...], bias, block, norm=norm, activation=activation, shortcut=shortcut, doubles=doubles,
        interpret=current_selection().interpret,
    )  # fmt: skip
    return Measured(*made)


def normalise_and_convolve(norm: GroupNorm, activation: Activation, conv: Conv, x: Measured) -> jax.Array:
    """Return `conv(activation(norm(x)))`, `(B, h, w, N)`; on a TPU perhaps by one kernel."""
    if kernel_block(conv, x.image) is None:
        return conv(activation(norm(x.image)))
    return convolve_by_kernel(conv, x.image, x.affine(norm), activation).image
