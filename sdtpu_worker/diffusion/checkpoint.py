"""Load a checkpoint: a folder or hub name in the diffusers layout, or one file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.families.family import Family, Params
from sdtpu_worker.diffusion.samplers import NoiseSchedule


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint does where a request asks for nothing else.

    Attributes:
        sampler: of its scheduler config.
        num_inference_steps: 50, and few for a distilled checkpoint.
        guidance_scale: 7.5, and less for a distilled checkpoint.
    """

    sampler: str
    num_inference_steps: int
    guidance_scale: float

    def fill(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with these values where it has none."""
        return request.with_defaults(self.sampler, self.num_inference_steps, self.guidance_scale)
