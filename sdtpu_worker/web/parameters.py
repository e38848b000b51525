"""The fields of a job in the door's APIs: the parameters of `generate` and the options that a caller may choose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.errors import InvalidRequest

PARAMETERS = tuple(field.name for field in dataclasses.fields(GenerationRequest))
"""Of `sdtpu_worker.generate`."""
OPTIONS = ("priority", "expires")
"""Of `apply_async`; `expires` in seconds."""
JOB_FIELDS = (*PARAMETERS, "tenant", *OPTIONS)


def without_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` among the fields of a job."""
    return {name: value for name, value in given.items() if name not in OPTIONS}


def check_expires(value: Any) -> float:
    """Return the seconds until a job expires.

    Raises:
        InvalidRequest: they are none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 10**9:
        raise InvalidRequest(f"expires must be seconds, more than 0 and at most 1,000,000,000, got {value!r:.40}")
    return value


def with_seed(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the parameters of one picture of a request for several: their seeds follow each other.

    Args:
        given: of the request; without a seed, each picture draws its own.
        number: of the picture, from 0.
    """
    seed = given.get("seed")
    if seed is None or not number:
        return dict(given)
    if isinstance(seed, str) and seed.isascii() and seed.isdigit():
        seed = int(seed)
    return {**given, "seed": seed + number if isinstance(seed, int) and not isinstance(seed, bool) else seed}


def digest_of(given: Mapping[str, Any]) -> str:
    """Return a digest of a request's content, the same for the same fields in any order."""
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
