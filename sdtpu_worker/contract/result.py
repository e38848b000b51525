"""What a finished job stores under its task id: JSON, with a reference to the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredImage:
    """Where an image is and what it is; `bytes` is its size."""

    uri: str
    format: str
    width: int
    height: int
    bytes: int


@dataclass(frozen=True)
class Timings:
    """Seconds: waiting for a slot, on the device, and from `delay()` (or reception) to stored."""

    queued_s: float
    device_s: float
    total_s: float


@dataclass(frozen=True)
class BatchPlace:
    """Which device and slot made the image, and how many of all slots were in use in the tick that finished it."""

    device: int
    slot: int
    occupied: int
    num_slots: int


@dataclass(frozen=True)
class GenerationResult:
    """The result of one job, as it was run: every default is filled in.

    Attributes:
        prompt_truncated: the prompt or the negative prompt was longer than 77 tokens.
        nsfw_content_detected: the safety checker's verdict (the image is then black); None without a checker.
    """

    task_id: str
    image: StoredImage
    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    model: str
    prompt_truncated: bool
    nsfw_content_detected: bool | None
    timings: Timings
    batch: BatchPlace

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON-compatible dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerationResult:
        """Build the result from what `AsyncResult.get()` returns."""
        parts = {"image": StoredImage, "timings": Timings, "batch": BatchPlace}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in data.items()})
