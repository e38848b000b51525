"""The small parts that all networks are made of. Arrays are NHWC, or (B, L, C) for sequences.

A parameter has the name that PyTorch gives it, `weight` or `bias`, in the layout that XLA wants: a linear weight is
(in, out), a convolution HWIO. All compute in the dtype of their input, except where a comment says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sdtpu_worker.models.network import parameter

Activation = Callable[[jax.Array], jax.Array]


def exact_gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution's cumulative function at x: not the usual approximation by tanh."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x * sigmoid(1.702 x), which the first CLIP models were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "gelu": exact_gelu,
    "relu": jax.nn.relu,
    "quick_gelu": quick_gelu,
}


class Linear(nnx.Module):
    """A matrix and, by default, a bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        self.weight = parameter(inputs, outputs)
        self.bias = parameter(outputs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(…, outputs)` of `(…, inputs)`."""
        out = x @ self.weight[...].astype(x.dtype)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
    """A convolution with a bias.

    Args:
        inputs, outputs: channels.
        kernel: of both sides.
        stride: of both sides.
        padding: of every side, or ((above, below), (left, right)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None,
        bias: bool = True,
    ) -> None:
        self.weight = parameter(kernel, kernel, inputs, outputs)
        self.bias = parameter(outputs) if bias else None
        self._strides = (stride, stride)
        padding = kernel // 2 if padding is None else padding
        self._padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `(B, h, w, outputs)` of `(B, h, w, inputs)`."""
        out = jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            self._strides,
            self._padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises the channels of each image, group by group."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        self.weight, self.bias = parameter(channels), parameter(channels)
        self._groups, self._eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like `x`, `(B, …, C)`."""
        # Mean and variance of thousands of numbers lose their digits in bfloat16.
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self._groups, x.shape[-1] // self._groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        normal = ((grouped - mean) * jax.lax.rsqrt(variance + self._eps)).reshape(x.shape)
        return (normal * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        self.weight, self.bias = parameter(channels), parameter(channels)
        self._eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array like `x`, `(…, C)`."""
        wide = x.astype(jnp.float32)  # as in GroupNorm
        mean = wide.mean(-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
        normal = (wide - mean) * jax.lax.rsqrt(variance + self._eps)
        return (normal * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A row for each of `count` numbers."""

    def __init__(self, count: int, width: int) -> None:
        self.weight = parameter(count, width)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return `(…, width)` of `(…) int32`."""
        return self.weight[...][ids]


def sinusoids(values: jax.Array, width: int, flip: bool = True, shift: float = 0.0) -> jax.Array:
    """Return sines and cosines of values at `width / 2` frequencies, `(…, width) float32`.

    Source: arXiv 2006.11239, section B, with the frequencies of arXiv 1706.03762.

    Args:
        values: `(…) float32`; in bfloat16 a thousand timesteps would be a hundred.
        width: even.
        flip: cosines first.
        shift: how much the number of steps between the frequencies is less than their number.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if flip else parts, axis=-1)


def upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """Return `(B, height, width, C)`, each pixel the one of `x` at floor(i * in / out), as PyTorch's nearest."""
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    if (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
        return x.repeat(2, axis=1).repeat(2, axis=2)
    return x[:, rows][:, :, columns]
