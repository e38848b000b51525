"""Layers with PyTorch's parameter names and defaults; images are NHWC.

A layer computes in the dtype of its input and casts its parameters to it. Norms compute in float32 whatever the input:
their sums over thousands of values lose all precision in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdtpu_worker.models.selection import current_selection

Activation = Callable[[jax.Array], jax.Array]
Padding = int | Sequence[tuple[int, int]]
Adapter = tuple[jax.Array, jax.Array]
"""What a LoRA adds to a layer, for every row of the batch: `down (B, in, r)` and `up (B, r, out)`."""


def parameter(shape: Sequence[int], torch_axes: Sequence[int] | None = None) -> nnx.Param:
    """Return a parameter of zeros, in float32.

    Args:
        shape: in our layout.
        torch_axes: the permutation that brings PyTorch's layout to ours; None where they are the same.
    """
    return nnx.Param(jnp.zeros(tuple(shape), jnp.float32), torch_axes=tuple(torch_axes) if torch_axes else None)


def gelu(x: jax.Array) -> jax.Array:
    """Return the exact GELU, which PyTorch means by the name; JAX's default is an approximation of it."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return the GELU of OpenAI's CLIP, `x sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
}


def _adapt(y: jax.Array, x: jax.Array, adapter: Adapter | None) -> jax.Array:
    """Return a layer's output `y (B, …, out)` with what the adapter of each row makes of the input `x (B, …, in)`."""
    return y if adapter is None else y + adapter_change(x, adapter).reshape(y.shape)


def adapter_change(x: jax.Array, adapter: Adapter) -> jax.Array:
    """Return what the adapter of each row makes of the input `x (B, …, in)`, `(B, L, out)`."""
    down, up = adapter
    return (x.reshape(x.shape[0], -1, x.shape[-1]) @ down.astype(x.dtype)) @ up.astype(x.dtype)


class Linear(nnx.Module):
    """A dense layer; `weight (in, out)`."""

    adapter: Adapter | None = None  # set by `Network` for one run

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.weight = parameter((in_features, out_features), (1, 0))
        self.bias = parameter((out_features,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(..., in)` to `(..., out)`."""
        y = x @ self.weight[...].astype(x.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return _adapt(y, x, self.adapter)


class Conv(nnx.Module):
    """A convolution of two dimensions; `weight (kernel, kernel, in, out)`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: side of the kernel.
        stride: of both axes.
        padding: zeros at all four sides, or `(before, after)` for each axis.
        bias: whether there is one.
    """

    adapter: Adapter | None = None  # set by `Network` for one run, of a convolution of 1 × 1 alone

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: Padding = 1,
        bias: bool = True,
    ) -> None:
        self.weight = parameter((kernel, kernel, in_channels, out_channels), (2, 3, 1, 0))
        self.bias = parameter((out_channels,)) if bias else None
        self.stride = stride
        pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.padding = tuple((int(before), int(after)) for before, after in pads)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, in)` to `(B, h', w', out)`."""
        y = jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return _adapt(y, x, self.adapter)


class GroupNorm(nnx.Module):
    """Normalise each group of channels over the whole image, in float32."""

    def __init__(self, num_groups: int, num_channels: int, eps: float) -> None:
        self.weight = parameter((num_channels,))
        self.bias = parameter((num_channels,))
        self.num_groups = num_groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(B, h, w, C)` to the same shape and dtype."""
        if current_selection().is_tpu:
            return self._by_channel(x)
        batch, height, width, channels = x.shape
        groups = x.astype(jnp.float32).reshape(batch, height, width, self.num_groups, channels // self.num_groups)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        unit = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return _scale_and_shift(unit, self.weight, self.bias).astype(x.dtype)

    def _by_channel(self, x: jax.Array) -> jax.Array:
        """Do the same without an array that has the groups as an axis.

        A TPU's lanes hold channels. Brought to groups of ten or twenty, the image would be copied in float32, so here
        only one number for each channel is.
        """
        wide = x.astype(jnp.float32)
        mean = self._of_groups(wide.mean((1, 2)))
        variance = self._of_groups(jnp.square(wide - mean[:, None, None]).mean((1, 2)))
        scale, shift = self._affine(mean, variance)
        return (wide * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)

    def scale_and_shift(self, sums: jax.Array, pixels: int) -> tuple[jax.Array, jax.Array]:
        """Return what the norm does to each channel of an image: `x * scale + shift`.

        The variance comes from the sum of squares, which takes one look at the image and not two. Of an image in
        bfloat16 it loses nothing: values whose mean is so large that float32 loses their variance have lost it before.

        Args:
            sums: of `channel_sums`.
            pixels: of the image.

        Returns:
            Both `(B, C) float32`.
        """
        mean, squares = (self._of_groups(sums[:, i] / pixels) for i in range(2))
        return self._affine(mean, jnp.maximum(squares - jnp.square(mean), 0))

    def _affine(self, mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jax.lax.rsqrt(variance + self.eps) * self.weight[...].astype(jnp.float32)
        return scale, self.bias[...].astype(jnp.float32) - mean * scale

    def _of_groups(self, by_channel: jax.Array) -> jax.Array:
        """Return `(B, C)`, for each channel the mean of its group."""
        batch, channels = by_channel.shape
        means = by_channel.reshape(batch, self.num_groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.num_groups, axis=-1)


def channel_sums(x: jax.Array) -> jax.Array:
    """Return for each channel of an image `(B, h, w, C)` the sum of its pixels and of their squares, `(B, 2, C)`."""
    wide = x.astype(jnp.float32)
    return jnp.stack([wide.sum((1, 2)), jnp.square(wide).sum((1, 2))], axis=1)


class LayerNorm(nnx.Module):
    """Normalise over the last axis, in float32."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        self.weight = parameter((features,))
        self.bias = parameter((features,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(..., features)` to the same shape and dtype."""
        wide, weight, bias = (each.astype(jnp.float32) for each in (x, self.weight[...], self.bias[...]))
        if current_selection().is_tpu and x.dtype == jnp.bfloat16:
            return _normalise_in_one_look(wide, weight, bias, self.eps).astype(x.dtype)
        return normalise(wide, weight, bias, self.eps).astype(x.dtype)


def _normalise_in_one_look(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Do what `normalise` does with the sum of squares in place of a second look.

    XLA takes both sums where the layer before makes `x`. Of values in bfloat16 that loses nothing, see
    `GroupNorm.scale_and_shift`.
    """
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * weight + bias


def normalise(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Return `x (..., features) float32` normalised over the last axis, scaled and shifted; also inside a kernel."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * weight + bias


def _scale_and_shift(x: jax.Array, weight: Any, bias: Any) -> jax.Array:
    return x * weight[...].astype(x.dtype) + bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors; `weight (count, features)`."""

    def __init__(self, count: int, features: int) -> None:
        self.weight = parameter((count, features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map ids `(...) int32` to `(..., features)`, in the dtype of the table."""
        return self.weight[...][ids]


class Nothing(nnx.Module):
    """Holds the place of a layer without parameters, so that its siblings keep PyTorch's numbers."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the input."""
        return x


def sinusoids(values: jax.Array, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Return the embedding of numbers by sines and cosines of geometric frequencies.

    Float32 throughout: timesteps go to 1000, and bfloat16 would round them to multiples of four.

    Args:
        values: `(B,) float32`.
        dim: of the embedding.
        flip_sin_to_cos: cosines come first.
        freq_shift: taken from the number of frequencies, where the exponent is divided by it.

    Returns:
        `(B, dim) float32`.

    Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    half = dim // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = values.astype(jnp.float32)[:, None] * np.exp(exponents)
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nnx.Module):
    """Two dense layers over a sinusoidal embedding; with `cond_dim`, a condition is added before the first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation,
        post_activation: Activation | None = None,
        cond_dim: int | None = None,
    ) -> None:
        self.linear_1 = Linear(in_features, out_features)
        self.cond_proj = None if cond_dim is None else Linear(cond_dim, in_features, bias=False)
        self.linear_2 = Linear(out_features, out_features)
        self.activation = activation
        self.post_activation = post_activation

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Map `(B, in)` and, if there is one, a condition `(B, cond_dim)` to `(B, out)`."""
        if condition is not None and self.cond_proj is not None:
            x = x + self.cond_proj(condition.astype(x.dtype))
        x = self.linear_2(self.activation(self.linear_1(x)))
        return x if self.post_activation is None else self.post_activation(x)


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resize an image `(B, h, w, C)` by repeating pixels, as PyTorch's mode "nearest" does.

    Output pixel i shows input pixel floor(i · in / out), the quotient in float32; `jax.image.resize` differs where
    the ratio is not a whole number.
    """
    for axis, wanted in ((1, height), (2, width)):
        have = x.shape[axis]
        if wanted % have == 0:
            x = jnp.repeat(x, wanted // have, axis)
        else:
            scale = np.float32(have) / np.float32(wanted)
            index = np.minimum((np.arange(wanted, dtype=np.float32) * scale).astype(np.int32), have - 1)
            x = jnp.take(x, index, axis)
    return x
