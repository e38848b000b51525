"""The checkpoint's safety checker on the devices."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from sdtpu_worker.diffusion.sharding import AXIS, SHARDED, put


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
        features = self._extractor(Image.fromarray(pixels), return_tensors="np").pixel_values
        count = self._mesh.shape[AXIS]
        batch = np.zeros((count, *features.shape[1:]), np.float32)
        batch[0] = features[0]
        wanted = np.arange(count) == 0
        with self._lock:
            flags = self._program(self._params, *put((batch, wanted), self._mesh, SHARDED))
        return bool(np.asarray(flags)[0])
