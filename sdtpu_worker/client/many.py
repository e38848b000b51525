"""Several pictures of one prompt, as a group of ordinary jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import group
from celery.result import GroupResult

from sdtpu_worker.client.task import generate
from sdtpu_worker.contract.parameter_checks import MAX_SEED
from sdtpu_worker.contract.request import DRAWN_SEED_BITS, draw_seed
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

MAX_PICTURES = 1000


def generate_many(
    prompt: str, n: int, *, seed: int | None = None, options: Mapping[str, Any] | None = None, **parameters: Any
) -> GroupResult:
    """Enqueue `n` jobs that differ in nothing but their seeds: `seed`, `seed + 1`, … `seed + n - 1`.

    Each picture is that of the single job with its seed. All parameters are checked before the first job is sent.

    Args:
        prompt: what the pictures show.
        n: how many, 1 to 1000.
        seed: of the first; None to draw one.
        options: of `apply_async`, for every job, such as `{"priority": 3}`.
        **parameters: of every job, as for `generate.delay`.

    Returns:
        Celery's result of a group: `.get()` gives the results in the order of the seeds.

    Raises:
        InvalidRequest: a parameter is not allowed.
        Exception: what `generate.apply_async` raises besides; the jobs before it are enqueued then.
    """
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_PICTURES:
        raise InvalidRequest(f"n must be an integer from 1 to {MAX_PICTURES:,}, got {brief(n)}")
    if seed is None:
        seed = min(draw_seed(), 2**DRAWN_SEED_BITS - n)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED - n + 1:
        raise InvalidRequest(f"seed must be an integer from 0 to 2**63 - {n}, so that {n} seeds fit, got {brief(seed)}")
    first = generate.s(prompt, seed=seed, **parameters)  # stores pictures, once
    jobs = [generate.s(prompt, **{**first.kwargs, "seed": seed + i}) for i in range(n)]
    return group(jobs).apply_async(**dict(options or {}))
