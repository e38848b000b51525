"""Which implementation an attention gets: a table by platform and shape, each row with the reason for it.

The first row that fits counts. Estimates are those of the TPU's compiler (libtpu 0.0.42, v5e), in million cycles for
one image with guidance, two rows of the batch; `docs/explanation/tpu-program.md` says how they were got.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jax.numpy as jnp

from sdtpu_worker.errors import ConfigurationError

AUTO = "auto"
OLD_GPU = "gpu without fused attention"
"""What the table calls a GPU that cuDNN's attention does not run on: one before NVIDIA's Ampere, or of another make."""
SMALL_TPU = "tpu with little vector memory"
"""What it calls a TPU before the v5: its 16 MiB for each core do not hold what the kernels keep there."""
_SMALL_TPUS = ("TPU v2", "TPU v3", "TPU v4")
"""How JAX's names of them begin. Compiled for a v4, the kernels of Stable Diffusion 1.5 ask for 20 MiB and more."""
_CUDNN_SINCE = 8.0
"""The least compute capability for it. Source: NVIDIA's support matrix of the operation, which begins with SM80."""
_ANY = (1, 2**31)


class Implementation(StrEnum):
    """The ways to compute an attention, by the names that `sdtpu_attention` has for them."""

    PLAIN = "plain"
    PACKED = "packed"
    CUDNN = "cudnn"


@dataclass(frozen=True)
class Shape:
    """What the choice depends on besides the platform.

    Attributes:
        queries, keys: how many of each.
        heads: how many.
        dim: of a head.
        dtype: of the computation.
    """

    queries: int
    keys: int
    heads: int
    dim: int
    dtype: str

    def __str__(self) -> str:
        """Return it for a log line."""
        return f"{self.queries} x {self.keys} tokens, {self.heads} heads of {self.dim}, {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One row of the table: where it fits, what it says, and why.

    Attributes:
        platform: JAX's name of it; `*` for any.
        queries, keys, dim: the least and the most that it fits.
        dim_multiple: what the size of a head must be a multiple of.
        dtypes: those that it fits; empty for any.
        implementation: the choice.
        block_queries: the most queries that a step of the packed kernel takes.
        counts_keys: prompts of several windows are one attention to all windows that a row may have, in which the keys
            of each row that count are its own. Elsewhere the further windows stand in a conditional.
        fused: up to how many heads and keys the projections of queries and output are in the kernel too. Its code grows
            with both, and a model such as XL has seventy of these layers to compile.
        reason: what was measured, compiled or documented.
    """

    platform: str
    implementation: Implementation
    reason: str
    queries: tuple[int, int] = _ANY
    keys: tuple[int, int] = _ANY
    dim: tuple[int, int] = _ANY
    dim_multiple: int = 1
    dtypes: tuple[str, ...] = ()
    block_queries: int = 0
    fused: tuple[int, int] = (0, 0)
    counts_keys: bool = False

    def fits(self, platform: str, shape: Shape) -> bool:
        """Return whether the row is for this shape on this platform."""
        sizes = (shape.queries, self.queries), (shape.keys, self.keys), (shape.dim, self.dim)
        return (
            self.platform in ("*", platform)
            and (not self.dtypes or shape.dtype in self.dtypes)
            and shape.dim % self.dim_multiple == 0
            and all(low <= size <= high for size, (low, high) in sizes)
        )


_PACKED_TPU: dict[str, Any] = {
    "platform": "tpu", "implementation": Implementation.PACKED, "dtypes": ("bfloat16",), "dim": (8, 128),
    "counts_keys": True,
}  # fmt: skip
TABLE = (
    Row(
        **_PACKED_TPU, queries=(512, 16_384), keys=(512, 9_216), block_queries=256, fused=(10, 9_216),
        reason="4,096 tokens, 8 heads of 40: 1.05 against 5.6 of XLA, whose scores pass through memory, and 1.06 with"
        " norm, projections and shortcut; 1,024 tokens, 8 heads of 80: 0.08; 9,216 tokens, 5 heads of 64: 3.4 with and"
        " 3.3 without them",
    ),
    Row(
        **_PACKED_TPU, queries=(512, 16_384), keys=(9_217, 16_384), block_queries=128,
        reason="as above; half the block, so that its scores fit the chip's vector memory",
    ),
    Row(
        **_PACKED_TPU, queries=(512, 16_384), keys=(1, 511), block_queries=512, fused=(8, 511),
        reason="a prompt of 77 tokens, 4,096 queries, 8 heads of 40: 0.09 against 0.42 of XLA, and 0.12 with"
        " norm, projections and shortcut",
    ),
    Row(
        "tpu", Implementation.PLAIN, queries=(1, 511), counts_keys=True,
        reason="few pixels: XLA keeps their scores on the chip; a transformer of 256 pixels, 1,280 features: 0.389 with"
        " three windows in every row, 0.383 with one, 0.400 with a conditional around the others",
    ),
    Row(
        "gpu", Implementation.CUDNN, dtypes=("bfloat16", "float16"), queries=(512, 2**31), keys=(64, 2**31),
        dim=(8, 128), dim_multiple=8,
        reason="cuDNN's fused attention keeps scores on the chip. Limits: JAX asks for heads of a multiple of 8 up to"
        " 128; with few queries there is little to keep. Not measured",
    ),
    Row("*", Implementation.PLAIN, "few tokens, or a type, a head or a platform that nothing else is for"),
)  # fmt: skip
"""Every row that there is, the last one for all that is left."""


@dataclass(frozen=True)
class DenseRow:
    """Where dense layers of a transformer are a kernel with the norm before them.

    Attributes:
        platform: JAX's name of it.
        tokens, features: the least and the most that it fits.
        dtype: that it fits.
        block_rows: the rows that a step of the kernel takes.
        reason: what was compiled.
    """

    platform: str
    tokens: tuple[int, int]
    features: tuple[int, int]
    dtype: str
    block_rows: int
    reason: str


DENSE_TABLE = (
    DenseRow(
        "tpu", tokens=(2048, 2**31), features=(64, 640), dtype="bfloat16", block_rows=128,
        reason="4,096 tokens, 320 features: 0.24 against 0.30 of XLA, which at 8 rows writes and reads 168 MB between"
        " the two products; 2,304 tokens, 640 features, at 16 rows: 0.38 against 0.57. Smaller ones it keeps on the"
        " chip by itself",
    ),
)  # fmt: skip
"""Those after an attention; elsewhere they are layers as everywhere."""

KEYS_TABLE = (
    DenseRow(
        "tpu", tokens=(1024, 2**31), features=(64, 640), dtype="bfloat16", block_rows=256,
        reason="4,096 tokens, 320 features: 0.05 against 0.13 of XLA, 0.05 of them for another look for the norm, and"
        " 0.22 with one slot; 1,024 tokens, 640 features: 0.04 against 0.08, half of them looks, and 0.12",
    ),
)  # fmt: skip
"""Those that make keys and values of a fused self-attention; elsewhere they are layers as everywhere."""


def dense_block_rows(platform: str, wanted: str, tokens: int, features: int, dtype: Any) -> int:
    """Return the rows that a step of the dense layers' kernel takes; 0 where layers as everywhere are better."""
    return _dense_block_rows(DENSE_TABLE, platform, wanted, tokens, features, dtype)


def key_block_rows(platform: str, wanted: str, shape: tuple[int, int, int], dtype: Any) -> int:
    """Return the same for keys and values of a self-attention to `(B, L, features)`; they divide B · L."""
    batch, tokens, features = shape
    block_rows = _dense_block_rows(KEYS_TABLE, platform, wanted, tokens, features, dtype)
    return block_rows if block_rows and batch * tokens % block_rows == 0 else 0


def _dense_block_rows(
    table: Sequence[DenseRow], platform: str, wanted: str, tokens: int, features: int, dtype: Any
) -> int:
    for row in table if wanted != Implementation.PLAIN else ():
        fits = all(low <= size <= high for size, (low, high) in ((tokens, row.tokens), (features, row.features)))
        if fits and (row.platform, row.dtype) == (platform, dtype_name(dtype)):
            return row.block_rows
    return 0


@dataclass(frozen=True)
class Choice:
    """What an attention gets, and why.

    Attributes:
        implementation: of it.
        block_queries: for the packed kernel, the most queries of a step.
        fuses: whether the packed kernel does the norm, the projections of queries and output and the shortcut too.
        reason: the row's.
        counts_keys: as the row has it.
    """

    implementation: Implementation
    block_queries: int
    reason: str
    fuses: bool = False
    counts_keys: bool = False


def choose(platform: str, wanted: str, shape: Shape, table: Sequence[Row] = TABLE) -> Choice:
    """Return the choice for a shape.

    Args:
        platform: JAX's name of it.
        wanted: `auto` for what the table says. An implementation's name: that one for every shape that a row gives to
            it, and the plain one for the others.
        shape: of the attention.
        table: the rows; the last one fits everything.
    """
    row = next(row for row in table if row.fits(platform, shape))
    if wanted not in (AUTO, row.implementation):
        return Choice(Implementation.PLAIN, 0, f"sdtpu_attention is {wanted}")
    fuses = shape.heads <= row.fused[0] and shape.keys <= row.fused[1]
    return Choice(row.implementation, row.block_queries, row.reason, fuses, row.counts_keys)


def kernel_platform(platform: str, device_kind: str, compute_capability: str | None = None) -> str:
    """Return what the table calls a device's platform.

    Args:
        platform: JAX's name of it.
        device_kind: JAX's name of the kind of device, like "TPU v5 lite".
        compute_capability: what JAX says of a GPU, like "8.0" for NVIDIA's Ampere; None if it says nothing.
    """
    if platform == "tpu":
        return SMALL_TPU if device_kind.startswith(_SMALL_TPUS) else platform
    if platform != "gpu":
        return platform
    is_nvidia = re.fullmatch(r"\d+\.\d+", compute_capability or "")  # AMD's are words
    return platform if is_nvidia and float(is_nvidia[0]) >= _CUDNN_SINCE else OLD_GPU


def check_wanted(platform: str, wanted: str) -> None:
    """Make sure that a platform has what the setting asks for.

    Raises:
        ConfigurationError: it has not.
    """
    possible = dict.fromkeys([AUTO, Implementation.PLAIN])
    possible |= dict.fromkeys(row.implementation for row in TABLE if row.platform == platform)
    if wanted not in possible:
        raise ConfigurationError(
            f"sdtpu_attention must be one of {', '.join(possible)} on the platform {platform}, got {wanted}"
        )


def dtype_name(dtype: Any) -> str:
    """Return a dtype's name as the table has it."""
    return jnp.dtype(dtype).name
