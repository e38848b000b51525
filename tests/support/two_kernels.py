"""Compiles two kernels by themselves for a TPU, in a process of its own: libtpu reads its options once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdtpu_worker.diffusion.ahead_of_time import described_devices
from sdtpu_worker.diffusion.lone_kernels import compile_lone_kernels
from sdtpu_worker.diffusion.matmul_counts import KernelWork, collecting_kernels, count_matmuls
from sdtpu_worker.models.attention.tpu_kernel import Packing, packed_attention
from sdtpu_worker.models.feed_forward_kernel import gated_feed_forward


def traced_kernels() -> dict[str, KernelWork]:
    """Return an attention to all windows of prompts and dense layers, by their keys."""
    packing = Packing(5, 64, is_even=True)

    def both(
        queries: jax.Array, keys: jax.Array, counts: jax.Array, x: jax.Array, row: jax.Array,
        weight_in: jax.Array, bias_in: jax.Array, weight_out: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        attended = packed_attention(queries, keys, keys, packing, num_keys=counts, block_queries=64)
        return attended, gated_feed_forward(
            x, row, row, weight_in, bias_in, weight_out, row, eps=1e-5, block_rows=64
        )  # fmt: skip

    sizes = (2, 128, packing.width), (2, 231, packing.width)
    layers = (2, 64, 128), (128,), (128, 512), (512,), (256, 128)
    queries, keys, *others = (jax.ShapeDtypeStruct(each, jnp.bfloat16) for each in (*sizes, *layers))
    with collecting_kernels() as found:
        count_matmuls(both, queries, keys, jax.ShapeDtypeStruct((2,), jnp.int32), *others)
    return found


if __name__ == "__main__":
    compile_lone_kernels([each.equation for each in traced_kernels().values()], described_devices("v5e:1x1")[0])
