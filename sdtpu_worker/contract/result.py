"""The result of a job: JSON under its task id, with a reference to the stored image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StoredImage:
    """Where an image is stored, and what it is.

    Attributes:
        uri: names the image in its store.
        format: png, jpeg or webp.
        width: pixels.
        height: pixels.
        bytes: the size of the encoded image.
    """

    uri: str
    format: str
    width: int
    height: int
    bytes: int


@dataclass(frozen=True)
class Timings:
    """How long a job took, in seconds.

    Attributes:
        queued_s: from `delay()` to the slot; if the client has sent no time, from the worker's receipt of the job.
        device_s: in the slot.
        total_s: from the same moment as `queued_s` to the stored image.
    """

    queued_s: float
    device_s: float
    total_s: float


@dataclass(frozen=True)
class BatchPlace:
    """Where the image was made.

    Attributes:
        device: the number of the device.
        slot: the number of the slot on that device.
        occupied: how many slots of the host were in use in the tick that finished the image.
        num_slots: how many slots the host has, without those of lost devices.
    """

    device: int
    slot: int
    occupied: int
    num_slots: int


def describe_loras(loras: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return pairs of name and weight as results report them."""
    return [{"name": name, "weight": weight} for name, weight in loras]


@dataclass(frozen=True)
class GenerationResult:
    """The result of one job, with the parameters that it was run with: every default is filled in.

    Attributes:
        task_id: the id of the job's task.
        image: the stored image.
        prompt, negative_prompt, seed, num_inference_steps, guidance_scale, sampler: as in `GenerationRequest`.
        model: the name of the checkpoint.
        prompt_truncated: whether the prompt or the negative prompt was longer than 77 tokens, and cut there.
        nsfw_content_detected: the safety checker's verdict; the image is black if it is True. None without a checker.
        timings: how long the job took.
        batch: the device and the slot that made the image.
        options: the other parameters that were given, such as `sigmas` and `clip_skip`.
        loras: `{"name", "weight"}` of each LoRA that made the image: those that are merged into the worker's
            checkpoint, then the job's own.
        reused: the image is that of an earlier equal job (`sdtpu_reuse`), whose `batch` this is; no device was asked.
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
    options: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[Mapping[str, Any]] = field(default_factory=list)
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON-compatible dict, with the seed also as text: JavaScript rounds large integers."""
        facts = dataclasses.asdict(self)
        names = list(facts)
        names.insert(names.index("seed") + 1, "seed_text")
        facts["seed_text"] = str(self.seed)
        return {name: facts[name] for name in names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerationResult:
        """Return the result that `to_json` gave, as `AsyncResult.get()` returns it."""
        parts = {"image": StoredImage, "timings": Timings, "batch": BatchPlace}
        fields = {name: value for name, value in data.items() if name != "seed_text"}  # the field `seed` says it too
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in fields.items()})
