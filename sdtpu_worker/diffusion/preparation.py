"""The host's part of a job, done before a slot is free: what the family encodes, the coefficient table, the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.samplers import make_table
from sdtpu_worker.errors import InvalidRequest


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to be inserted.

    Attributes:
        parameters: what the image is made with besides prompts and seed, as results report it; no default is left.
        num_steps: denoising steps of the devices: the rows of the table that count.
        inputs: by name, what the family encodes when the job gets its slot.
        key_data: `(2,) uint32`, high and low word of the key.
        guidance_scale, guidance_rescale: as in the request.
        init_noise_sigma: what the initial noise is multiplied by.
        table: `(MAX_STEPS, columns) float32` coefficients.
        truncated: a prompt had more tokens than the text encoder takes.
    """

    task_id: str
    lane: Lane
    parameters: Mapping[str, Any]
    num_steps: int
    inputs: Mapping[str, np.ndarray]
    key_data: np.ndarray
    guidance_scale: float
    guidance_rescale: float
    init_noise_sigma: float
    table: np.ndarray
    truncated: bool


def prepare_job(
    checkpoint: Checkpoint,
    lanes: Collection[Lane],
    task_id: str,
    request: GenerationRequest,
    key_data: np.ndarray | None,
) -> PreparedJob:
    """Return a job that an engine can insert.

    Args:
        checkpoint: the loaded model.
        lanes: the resolutions that have programs.
        task_id: names the job in plans.
        request: with a seed, unless `key_data` is given.
        key_data: `(2,) uint32`, raw key words (for split keys), instead of the request's seed.

    Raises:
        InvalidRequest: no lane has the size, the sampler is not known, there is no seed, or the model cannot do it.
    """
    request = checkpoint.defaults.fill(request)
    assert request.num_inference_steps is not None
    assert request.guidance_scale is not None
    height, width = checkpoint.family.default_size
    lane = (request.height or height, request.width or width)
    if lane not in lanes:
        raise InvalidRequest(
            f"height x width must be one of {', '.join(map(format_size, lanes))} (sdtpu_resolutions),"
            f" got {format_size(lane)}"
        )
    table = make_table(checkpoint.schedule, request.num_inference_steps, request.sampler, request.sigmas, request.eta)
    if key_data is None:
        if request.seed is None:
            raise InvalidRequest("seed is missing: pass one, or the key's words")
        key_data = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
    inputs, truncated = checkpoint.family.make_inputs(request, lane)
    return PreparedJob(
        task_id=task_id,
        lane=lane,
        parameters=request.parameters(),
        num_steps=table.num_rows,
        inputs=inputs,
        key_data=np.asarray(key_data, np.uint32),
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        init_noise_sigma=table.init_noise_sigma,
        table=table.rows,
        truncated=truncated,
    )


def format_size(lane: Lane) -> str:
    """Return a size as settings and messages write it, `height x width` without the spaces."""
    return f"{lane[0]}x{lane[1]}"
