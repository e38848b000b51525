"""The checkpoint's safety checker on the devices."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from sdtpu_worker.diffusion.sharding import AXIS, REPLICATED, SHARDED, put


class SafetyChecker:
    """Checks one image at a time, on the first device. Any thread.

    Args:
        program: compiled of `lower_safety_check`.
        params: the checker's parameters on the mesh, replicated.
        extractor: transformers' `CLIPImageProcessor` of the checkpoint.
        mesh: the devices.
    """

    def __init__(self, program: jax.stages.Compiled, params: Any, extractor: Any, mesh: Mesh) -> None:
        self._program, self._params, self._extractor, self._mesh = program, params, extractor, mesh
        self._lock = threading.Lock()

    def flags(self, pixels: np.ndarray) -> bool:
        """Return whether the checker flags an image.

        Args:
            pixels: `(height, width, 3) uint8`.
        """
        features = np.asarray(self._extractor(Image.fromarray(pixels), return_tensors="np").pixel_values)
        count = self._mesh.shape[AXIS]
        batch = np.zeros((count, *features.shape[1:]), np.float32)
        batch[0] = features[0]
        wanted = np.arange(count) == 0
        with self._lock:
            flags = self._program(self._params, *put((batch, wanted), self._mesh, SHARDED))
        return bool(np.asarray(flags)[0])


def lower_safety_check(network: Any, crop: tuple[int, int], params: Any, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the safety checker.

    Args:
        network: the checker, a `models.network.Network`.
        crop: `(height, width)` of what it looks at, in pixels.
        params: its parameters on the mesh, replicated.
        mesh: the devices.

    Returns:
        What `.compile()` makes `check(params, pixel_values (D, 3, H, W) float32, wanted (D,) bool) -> (D,) bool` of.
    """

    def local_check(params: Any, pixel_values: jax.Array, wanted: jax.Array) -> jax.Array:
        def run() -> jax.Array:
            return network(params, pixel_values.transpose(0, 2, 3, 1))

        return jax.lax.cond(wanted[0], run, lambda: jnp.zeros(1, bool))

    check = jax.shard_map(
        local_check, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    sharded, count = NamedSharding(mesh, SHARDED), mesh.shape[AXIS]
    pixel_values = jax.ShapeDtypeStruct((count, 3, *crop), jnp.float32, sharding=sharded)
    wanted = jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=sharded)
    return jax.jit(check).lower(params, pixel_values, wanted)
