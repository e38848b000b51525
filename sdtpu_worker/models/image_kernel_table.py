"""Which kernels images get on a TPU, beside attention and dense layers: tables by shape, each row with its reason.

Estimates are those of `kernel_table`: million cycles for one image with guidance, two rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdtpu_worker.models.kernel_table import Implementation, dtype_name
from sdtpu_worker.models.sums_kernel import batch_in_sublanes


@dataclass(frozen=True)
class ConvolutionRow:
    """Where a convolution of 3 × 3 is a kernel, with the norm, the activation and the shortcut around it.

    Attributes:
        platform: JAX's name of it.
        doubles: whether it is for convolutions of images that are enlarged first.
        batch, pixels, channels, features: the least and the most that it fits.
        dtype: that it fits.
        reason: what was compiled.
    """

    platform: str
    doubles: bool
    batch: tuple[int, int]
    pixels: tuple[int, int]
    channels: tuple[int, int]
    features: tuple[int, int]
    dtype: str
    reason: str


CONVOLUTION_TABLE = (
    ConvolutionRow(
        "tpu", False, batch=(1, 7), pixels=(256, 2**31), channels=(64, 2560), features=(1, 1280), dtype="bfloat16",
        reason="the decoder of 512 x 512: 17.0 and 2.2 for what is left to XLA, against 53.7 of XLA, which cuts one"
        " image into eight strips to fill the sublanes; three slots of Stable Diffusion 1.5, six rows: 20.2 for a step,"
        " and 26.2 before these and projections were kernels there and layer norms looked once. Of eight rows XLA's are"
        " as good",
    ),
    ConvolutionRow(
        "tpu", True, batch=(1, 32), pixels=(256, 2**31), channels=(64, 1280), features=(64, 1280), dtype="bfloat16",
        reason="four products in place of nine, and no enlarged image: 128 x 128 pixels of 512 to 256 x 256: 1.05; XLA"
        " takes 2.46 for the convolution and as much again to repeat the pixels",
    ),
)  # fmt: skip
"""Elsewhere they are layers as everywhere."""

_SUBLANES = 16  # pixels in a tile of bfloat16: a row of an image must fill whole ones
_MOST_PRODUCTS = 3 * 2**26  # multiplications of one place of the kernel in a step: about 27,000 instructions
_MOST_WEIGHTS = 1024 * 1280  # of one place
_MOST_PIXELS = 4096


def convolution_block(
    platform: str, wanted: str, shape: tuple[int, int, int, int], features: int, doubles: bool, dtype: Any
) -> tuple[int, int] | None:
    """Return the rows and the features that a step of the convolution's kernel takes; None where XLA's is better.

    Args:
        platform: JAX's name of it.
        wanted: the setting `sdtpu_attention`; `plain` asks for no kernel at all.
        shape: of the input, `(B, h, w, C)`.
        features: of the output.
        doubles: the image is enlarged first.
        dtype: of the computation.
    """
    batch, height, width, channels = shape
    sizes = batch, height * width, channels, features
    fits = wanted != Implementation.PLAIN and width % _SUBLANES == 0 and any(
        (row.platform, row.doubles, row.dtype) == (platform, doubles, dtype_name(dtype))
        and all(low <= size <= high for size, (low, high) in zip(sizes, _limits(row), strict=True))
        for row in CONVOLUTION_TABLE
    )  # fmt: skip
    if not fits:
        return None
    places = 16 / 9 if doubles else 1
    block_features = _largest_divisor(features, int(_MOST_WEIGHTS / places / channels), 128)
    pixels = min(_MOST_PIXELS, int(_MOST_PRODUCTS / places / (channels * block_features)))
    return _largest_divisor(height, pixels // width, 1), block_features


def _limits(row: ConvolutionRow) -> tuple[tuple[int, int], ...]:
    return row.batch, row.pixels, row.channels, row.features


def _largest_divisor(number: int, most: int, unit: int) -> int:
    """Return the largest divisor of a number that is a multiple of the unit and at most `most`.

    The whole number counts as a multiple. With no such divisor the smallest is returned.
    """
    possible = [each for each in range(1, number + 1) if number % each == 0 and (each % unit == 0 or each == number)]
    return max((each for each in possible if each <= most), default=possible[0])


@dataclass(frozen=True)
class ImageRow:
    """Which images have a kernel for the sums of a group norm, or for the projections between them and a transformer.

    Attributes:
        platform: JAX's name of it.
        batch, pixels, channels: the least and the most that it fits.
        batch_multiple: what the batch must be a multiple of.
        dtype: that it fits.
        reason: what was compiled.
    """

    platform: str
    batch: tuple[int, int]
    batch_multiple: int
    pixels: tuple[int, int]
    channels: tuple[int, int]
    dtype: str
    reason: str


SUMS_TABLE = (
    ImageRow(
        "tpu", batch=(8, 32), batch_multiple=8, pixels=(64, 2**31), channels=(128, 2560), dtype="bfloat16",
        reason="64 x 64 pixels, 320 channels: both sums 0.004, where each of XLA's two looks takes 0.04, if it is not"
        " fused behind a convolution",
    ),
)  # fmt: skip
"""Elsewhere a norm looks at its image twice, by XLA, or gets its sums from the kernel of convolutions."""

PROJECTION_TABLE = (
    ImageRow(
        "tpu", batch=(8, 32), batch_multiple=8, pixels=(1024, 2**31), channels=(128, 2560), dtype="bfloat16",
        reason="64 x 64 pixels, 320 channels: into a transformer and out of it 0.02 and 0.03, where XLA takes 0.03 for"
        " each and 0.07 for a copy from one order of the axes to the other",
    ),
    ImageRow(
        "tpu", batch=(1, 7), batch_multiple=1, pixels=(1024, 2**31), channels=(128, 2560), dtype="bfloat16",
        reason="a step of Stable Diffusion 1.5 with one slot: 7.9 by XLA, 14.6 by kernels, 15.0 ms; without them 11.6"
        " and 14.3, 17.3 ms, for copies into another order of the axes and for looks at images for their sums",
    ),
)  # fmt: skip
"""The same for the projections into transformers and out of them, which leave the sums of the image besides."""

_MOST_SUMMED = 128 * 8 * 384  # numbers in a block, which are about 430 bundles of instructions
_MOST_PROJECTED = 64 * 8 * 384  # the same for a projection: about 1,700 bundles


def sums_block_pixels(platform: str, wanted: str, shape: tuple[int, int, int, int], dtype: Any) -> int:
    """Return the pixels that a step of the sums' kernel takes; 0 where there is none.

    Args:
        platform: JAX's name of it.
        wanted: the setting `sdtpu_attention`; `plain` asks for no kernel at all.
        shape: of the image, `(B, h, w, C)`.
        dtype: of the image.
    """
    return _block_pixels(_MOST_SUMMED, 2, shape) if _fits(SUMS_TABLE, platform, wanted, shape, dtype) else 0


def projection_block_pixels(platform: str, wanted: str, shape: tuple[int, int, int, int], dtype: Any) -> int:
    """Return the same for the projections between an image and a transformer; 0 where there is no kernel for them.

    A step takes the pixels of all rows of the batch where those lie in the sublanes, elsewhere of one row.
    """
    if not _fits(PROJECTION_TABLE, platform, wanted, shape, dtype):
        return 0
    of_step = shape if batch_in_sublanes(shape[0]) else (1, *shape[1:])
    return _block_pixels(_MOST_PROJECTED, _SUBLANES, of_step)


def _fits(
    table: tuple[ImageRow, ...], platform: str, wanted: str, shape: tuple[int, int, int, int], dtype: Any
) -> bool:
    batch, height, width, channels = shape
    return wanted != Implementation.PLAIN and any(
        (row.platform, row.dtype) == (platform, dtype_name(dtype))
        and batch % row.batch_multiple == 0
        and row.batch[0] <= batch <= row.batch[1]
        and row.pixels[0] <= height * width <= row.pixels[1]
        and row.channels[0] <= channels <= row.channels[1]
        for row in table
    )


def _block_pixels(most: int, unit: int, shape: tuple[int, int, int, int]) -> int:
    """Return the pixels of a block with at most so many numbers; 0 where none divides the image."""
    batch, height, width, channels = shape
    pixels = height * width
    return 0 if pixels % unit else _largest_divisor(pixels, most // (batch * channels), unit)
