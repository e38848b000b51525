"""The host's part of a job, done before a slot is free: token ids, the coefficient table, the key."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

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
        prompt_ids: `(2, 77) int32`, negative prompt first.
        key_data: `(2,) uint32`, high and low word of the key.
        num_inference_steps: rows of the table, which is how often the model is asked.
        table: `(MAX_STEPS, columns) float32` coefficients.
        truncated: a prompt had more tokens than the text encoder takes.
    """

    task_id: str
    lane: Lane
    sampler: str
    prompt_ids: np.ndarray
    key_data: np.ndarray
    num_inference_steps: int
    guidance_scale: float
    init_noise_sigma: float
    table: np.ndarray
    truncated: bool


def prepare_job(
    checkpoint: Checkpoint,
    lanes: Collection[Lane],
    tokenise: Callable[[list[str]], tuple[np.ndarray, bool]],
    task_id: str,
    request: GenerationRequest,
    key_data: np.ndarray | None,
) -> PreparedJob:
    """Return a job that an engine can insert.

    Args:
        checkpoint: the loaded model.
        lanes: the resolutions that have programs.
        tokenise: returns the token ids of prompts, and whether any had to be cut.
        task_id: names the job in plans.
        request: with a seed, unless `key_data` is given.
        key_data: `(2,) uint32`, raw key words (for split keys), instead of the request's seed.

    Raises:
        InvalidRequest: no lane has the size, the sampler is not known, or there is no seed.
    """
    height, width = checkpoint.default_size
    lane = (request.height or height, request.width or width)
    if lane not in lanes:
        raise InvalidRequest(
            f"height x width must be one of {', '.join(map(format_size, lanes))} (sdtpu_resolutions),"
            f" got {format_size(lane)}"
        )
    sampler = request.sampler or checkpoint.default_sampler
    table = make_table(checkpoint.schedule, request.num_inference_steps, sampler=request.sampler)
    if table.stochastic:  # until the programs draw a row's noise
        raise InvalidRequest(f"sampler must be one without noise, got {sampler!r}")
    if key_data is None:
        if request.seed is None:
            raise InvalidRequest("seed is missing: pass one, or the key's words")
        key_data = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
    prompt_ids, truncated = tokenise([request.negative_prompt, request.prompt])
    return PreparedJob(
        task_id=task_id,
        lane=lane,
        sampler=sampler,
        prompt_ids=prompt_ids,
        key_data=np.asarray(key_data, np.uint32),
        num_inference_steps=table.num_rows,
        guidance_scale=request.guidance_scale,
        init_noise_sigma=table.init_noise_sigma,
        table=table.rows,
        truncated=truncated,
    )


def format_size(lane: Lane) -> str:
    """Return a size as settings and messages write it, `height x width` without the spaces."""
    return f"{lane[0]}x{lane[1]}"
