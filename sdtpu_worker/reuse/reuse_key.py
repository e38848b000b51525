"""The reuse key: a hash over everything that decides the bytes of a job's image.

Two jobs have the same key exactly if a worker would store the same image for both, text chunks aside that name the
pictures they start from. What comes in:

engine     its digest of the prepared job: weights, configs, sizes, versions, devices, and what the job is to the
           programs, such as token ids, coefficients, the key of its noise, the contents of its pictures and LoRAs
request    every field of `GenerationRequest`, with seed, size, steps, guidance scale and sampler resolved. Pictures are
           left out: their contents count, not where they lie
maker      what encodes the pixels, and the version of this package
tenant     whose jobs may have each other's images

A new field of the request or of the prepared job comes in by itself. What a client asks for besides the image
(priority, `expires`, time limits, `idempotency_key`) is in neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sdtpu_worker.contract.request import PICTURES, GenerationRequest


@dataclasses.dataclass(frozen=True)
class Maker:
    """What makes images of requests, besides the engine.

    Attributes:
        software: the version of this package, and what encodes images.
        model: the checkpoint's name, which a PNG's text chunks and every result have.
    """

    software: str
    model: str


def reuse_key(
    pixels: str,
    request: GenerationRequest,
    parameters: Mapping[str, Any],
    lane: tuple[int, int],
    maker: Maker,
    group: str,
) -> str:
    """Return the reuse key of a job, 64 hexadecimal digits.

    Args:
        pixels: the engine's digest of the prepared job (`ServingEngine.pixel_digest`).
        request: with a seed.
        parameters: those of the prepared job, without a default left.
        lane: the size of the image, `(height, width)` in pixels.
        maker: what else makes the image.
        group: jobs of one group may have each other's images, jobs of two groups may not.
    """
    asked = {each.name: getattr(request, each.name) for each in dataclasses.fields(request)}
    asked |= {**parameters, "height": lane[0], "width": lane[1]}
    for name in PICTURES:
        del asked[name]
    facts = {"pixels": pixels, "request": asked, **dataclasses.asdict(maker), "group": group}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode(errors="surrogatepass")).hexdigest()
