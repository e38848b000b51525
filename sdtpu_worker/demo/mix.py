"""`sdtpu demo --mix`: jobs of every kind for one device batch, and what the worker's timeline says of their ticks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTINGS = {"SDTPU_LORAS": "outline=embedded-outline", "SDTPU_LORA_RANK": "4"}
"""What the worker of the mix is told besides."""
SLOTS_PER_DEVICE = 3
"""Slots for all jobs of the mix on eight devices."""
_LEFT = "on the left of a white background"


@dataclass(frozen=True)
class MixedJob:
    """One job of the mix.

    Attributes:
        prompt: of the job.
        seed: added to the demo's own.
        sampler, steps, guidance_scale: of the job.
        more: further parameters.
        starts_from_first: its picture is the image of the first job.
        masked: only the left of the picture, where its shape is, is drawn again.
    """

    prompt: str
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    more: Mapping[str, Any] = field(default_factory=dict)
    starts_from_first: bool = False
    masked: bool = False

    @property
    def kind(self) -> str:
        """What it is, in words; its sampler, steps and guidance not counted."""
        words = "inpainting" if self.masked else "image to image" if self.starts_from_first else "text"
        words += " unguided" if self.guidance_scale == 1 else ""
        return " ".join([words, *(f"+ {name} {weight:g}" for name, weight in self.more.get("loras", ()))])

    @property
    def label(self) -> str:
        """What the contact sheet says below its picture."""
        return f"{self.kind} [{self.sampler}, {self.steps} steps, {self.guidance_scale:g}] {self.prompt}"

    def parameters(self, seed: int) -> dict[str, Any]:
        """Return the job's parameters, without pictures.

        Args:
            seed: of the demo.
        """
        return {
            "prompt": self.prompt,
            "seed": seed + self.seed,
            "sampler": self.sampler,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            **self.more,
        }

    def pictures(self, first: Any) -> dict[str, Any]:
        """Return the job's pictures by parameter.

        Args:
            first: the result of the first job.
        """
        return {
            **({"image": first} if self.starts_from_first else {}),
            **({"mask_image": draw_mask()} if self.masked else {}),
        }


def draw_mask() -> Any:
    """Return the mask that is light where a picture is drawn again: two thirds of it, from the left."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 41, 63), fill=255)
    return mask


def _outline(weight: float) -> dict[str, Any]:
    return {"loras": [("outline", weight)]}


def _again(strength: float) -> dict[str, Any]:
    return {"strength": strength}


JOBS = (
    MixedJob(f"a red circle {_LEFT}", 0, "dpmsolver++", 30, 7.5),
    MixedJob(f"a blue circle {_LEFT}", 10, "dpmsolver++", 30, 7.5, _again(0.4), starts_from_first=True),
    MixedJob(f"a green circle {_LEFT}", 10, "ddim", 40, 7.5, _again(0.5), starts_from_first=True),
    MixedJob(f"a purple heart {_LEFT}", 3, "euler", 30, 9.0, _again(0.8), True),
    MixedJob(f"a blue circle {_LEFT}", 4, "dpmsolver++", 30, 7.5, _again(0.5) | _outline(1.0), starts_from_first=True),
    MixedJob(f"a green square {_LEFT}", 2, "dpmsolver++", 30, 7.5, starts_from_first=True, masked=True),
    MixedJob(f"a blue heart {_LEFT}", 4, "ddim", 50, 7.5, starts_from_first=True, masked=True),
    MixedJob(f"a blue circle {_LEFT}", 3, "euler", 30, 7.5, _outline(1.0), True, True),
    *(MixedJob("a blue heart on a yellow background", 20, "dpmsolver++", 30, 7.5, _outline(w)) for w in (0, 0.5, 1.0)),
    MixedJob("a large white circle on a purple background", 21, "ddim", 30, 7.5, _outline(1.0)),
    MixedJob("a black square on an orange background", 22, "euler", 25, 7.5, _outline(1.0)),
    MixedJob("a large red triangle on a white background", 23, "unipc", 20, 7.5, _outline(0.8)),
    MixedJob("a yellow star on a purple background", 24, "dpmsolver++", 20, 7.5),
    MixedJob("a white heart on a red background", 25, "euler_ancestral", 35, 7.5),
    MixedJob("a green triangle on a white background", 26, "pndm", 30, 5.0),
    MixedJob("a blue square on a yellow background", 27, "heun", 20, 7.5),
    MixedJob("an orange ring on a black background", 28, "unipc", 15, 7.5),
    MixedJob("a small white star on a blue background", 29, "deis", 25, 7.5),
    MixedJob("a black ring on a green background", 30, "dpm2", 20, 6.0),
    MixedJob("a large green circle on a black background", 31, "lms", 40, 7.5),
    MixedJob("a yellow circle on a blue background", 32, "dpmsolver++", 30, 1.0),
    MixedJob("a white square on a red background", 33, "dpmsolver++_sde", 20, 10.0),
)


@dataclass(frozen=True)
class SharedTicks:
    """What ran together.

    Attributes:
        ticks: how many ticks had a job of the mix in a slot.
        jobs: the most jobs that a tick had.
        kinds: the most kinds that a tick had: text, image, mask, LoRAs with their weights, guided or not.
        settings: the most different samplers with steps and guidance that a tick had.
    """

    ticks: int
    jobs: int
    kinds: int
    settings: int


def count_shared_ticks(trace: Path, jobs: Mapping[str, MixedJob]) -> SharedTicks:
    """Read a worker's timeline (`sdtpu_trace`), and return what its ticks had in common.

    A job is in every tick from the one that inserts it to the one that decodes it.

    Args:
        trace: the file; its writer has ended.
        jobs: by task id.
    """
    # A worker that is killed leaves the last line out.
    lines = [line.rstrip(",") for line in trace.read_text(encoding="utf-8").splitlines() if line.startswith('{"')]
    events = [json.loads(line) for line in lines]
    starts = sorted(event["ts"] for event in events if event["name"] == "occupancy")
    came = _times(events, "insert")
    left = _times(events, "decode")
    shared = []
    for start, following in zip(starts, [*starts[1:], float("inf")], strict=True):
        inside = [job for task_id, job in jobs.items() if task_id in left
                  and came[task_id] < following and left[task_id] >= start]  # fmt: skip
        shared.append(inside)
    shared = [inside for inside in shared if inside]
    return SharedTicks(
        ticks=len(shared),
        jobs=max((len(inside) for inside in shared), default=0),
        kinds=max((len({job.kind for job in inside}) for inside in shared), default=0),
        settings=max((len({(j.sampler, j.steps, j.guidance_scale) for j in inside}) for inside in shared), default=0),
    )


def _times(events: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return by task id when a phase of this name was, in the timeline's microseconds."""
    return {event["args"]["task"]: event["ts"] for event in events if event["name"] == name and "task" in event["args"]}


def table(jobs: Sequence[MixedJob]) -> str:
    """Return what each job was, a line each, as the contact sheet has them."""
    rows = [
        (f"{number:3}", job.kind, job.sampler, f"{job.steps} steps", f"guidance {job.guidance_scale:g}", job.prompt)
        for number, job in enumerate(jobs)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
    )
