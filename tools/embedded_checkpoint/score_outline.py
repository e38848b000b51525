"""Score the LoRA `embedded-outline`: what share of the pictures shows an outline of what the prompt says.

    python -m tools.embedded_checkpoint.score_outline [--out DIR]
    python -m tools.embedded_checkpoint.score_outline --lora work/outline.safetensors --prompts 40

Takes prompts whose combination of colour, shape and background was never trained on, and generates an image of each
with the LoRA at several weights, all in one batch. A picture is judged from its pixels: the drawing of a shape, filled
or outlined, that fits best to what is seen says where the border and the inside are, and their colours are read there.
Takes some minutes on two cores for 100 prompts. Prints a row per weight, without rings, which are hollow as they
are, and one per shape at the last weight; with `--out` it also writes `outline-scores.json` and the contact sheet
`outline.png`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.demo.command import labelled_grid
from tools.embedded_checkpoint.scenes import IMAGE_SIZE, SHAPES, STROKES, Scene, draw_mask, judge, nearest_colour
from tools.embedded_checkpoint.score import held_out_scenes

RANK = 4
WEIGHTS = (0.0, 0.5, 1.0)
COLUMNS = ("outlined", "colour", "background", "shape", "all four")


@dataclass(frozen=True)
class Outline:
    """What is seen in a picture.

    Attributes:
        shape: whose drawing fits best.
        border, inside, background: the colours of the border, of what it encloses, and of the rest.
    """

    shape: str
    border: str
    inside: str
    background: str

    @property
    def is_outlined(self) -> bool:
        """Whether the inside has the colour of the background, and the border another one."""
        return self.inside == self.background != self.border


def judge_outline(image: Image.Image) -> Outline:
    """Return the shape, filled or outlined, whose drawing is most like the picture, and the colours of its parts.

    Args:
        image: 64 x 64 RGB.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    seen = judge(image)
    if seen.shape == "nothing":
        return Outline("nothing", seen.background, seen.background, seen.background)
    plain = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    distance = np.linalg.norm(pixels - plain, axis=-1)
    coverage = np.clip(distance / np.quantile(distance, 0.99), 0, 1)
    x, y = IMAGE_SIZE / 2 + seen.x, IMAGE_SIZE / 2 + seen.y
    shape, radius = min(
        ((_error(coverage, shape, x, y, radius, stroke), shape, radius)
         for shape in SHAPES for radius in seen.radius * np.array((0.9, 0.95, 1.0, 1.05, 1.1))
         for stroke in {None, STROKES.get(shape)}),
    )[1:]  # fmt: skip
    border, inside = _parts(shape, x, y, float(radius))
    if not border.any() or not inside.any():  # too small to enclose anything
        return Outline(shape, seen.colour, seen.colour, nearest_colour(plain))
    colours = [nearest_colour(np.median(pixels[part], axis=0)) for part in (border, inside)]
    return Outline(shape, colours[0], colours[1], nearest_colour(plain))


def _error(coverage: np.ndarray, shape: str, x: float, y: float, radius: float, stroke: float | None) -> float:
    """Return how much a drawing, whose bounding box is at this place, differs from what is seen."""
    left, top, right, bottom = _box(shape)
    drawn = draw_mask(shape, x - radius * (left + right) / 2, y - radius * (top + bottom) / 2, radius, stroke=stroke)
    blurred = np.asarray(drawn.filter(ImageFilter.GaussianBlur(1.0)), np.float32) / 255
    return float(((coverage - blurred) ** 2).sum())


def _parts(shape: str, x: float, y: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which pixels of a drawing are border, and which ones the border encloses, each `(64, 64) bool`."""
    left, top, right, bottom = _box(shape)
    place = x - radius * (left + right) / 2, y - radius * (top + bottom) / 2, radius
    border = np.asarray(draw_mask(shape, *place, stroke=STROKES.get(shape)))
    whole = np.asarray(draw_mask("circle" if shape == "ring" else shape, *place))
    return border > 200, (whole == 255) & (border == 0)


@functools.cache
def _box(shape: str) -> tuple[float, float, float, float]:
    """Return the bounding box of a shape at radius 1: left, top, right, bottom of its centre."""
    ys, xs = np.nonzero(np.asarray(draw_mask(shape, 64, 64, 50, size=128)) > 127)
    left, top, right, bottom = ((side - 64) / 50 for side in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return left, top, right, bottom


def score(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Return the share of pictures that are right, by column.

    A ring and an outlined circle differ by the width of their line alone, so one counts as the other.

    Args:
        scenes: what the pictures should show.
        pictures: one picture of each scene.
    """
    found = []
    for scene, picture in zip(scenes, pictures, strict=True):
        seen = judge_outline(picture)
        is_shape = seen.shape == scene.shape or {seen.shape, scene.shape} == {"circle", "ring"}
        right = [seen.is_outlined, seen.border == scene.colour, seen.background == scene.background, is_shape]
        found.append([*right, all(right)])
    return {column: round(float(share), 4) for column, share in zip(COLUMNS, np.mean(found, axis=0), strict=True)}


def main() -> None:
    """Generate the images, judge them and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="embedded", help="folder; default: the shipped one")
    parser.add_argument("--lora", default="embedded-outline", help="file; default: the shipped one")
    parser.add_argument("--weights", nargs="+", type=float, default=WEIGHTS, help="of the LoRA, to compare")
    parser.add_argument("--prompts", type=int, default=100, help="prompts per weight")
    parser.add_argument("--sampler", default="dpmsolver++", help="sampler of all jobs")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="guidance")
    parser.add_argument("--out", type=Path, help="folder for outline-scores.json and outline.png")
    args = parser.parse_args()
    scenes = held_out_scenes(args.prompts)
    asked = {"sampler": args.sampler, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    drawn = draw(args.checkpoint, args.lora, scenes, args.weights, asked)
    rows = {f"weight {weight:g}": without_rings(scenes, drawn[weight]) for weight in args.weights}
    last = drawn[args.weights[-1]]
    for shape in SHAPES:
        of_shape = [(scene, picture) for scene, picture in zip(scenes, last, strict=True) if scene.shape == shape]
        rows[f"{shape}, weight {args.weights[-1]:g}"] = of_shape
    scores = {name: score(*zip(*pairs, strict=True)) for name, pairs in rows.items() if pairs}
    print(f"{'':<20} {'pictures':>10}", *(f"{column:>11}" for column in COLUMNS))
    for name, found in scores.items():
        print(f"{name:<20} {len(rows[name]):>10}", *(f"{100 * found[column]:>10.1f}%" for column in COLUMNS))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"prompts": args.prompts, **asked, "scores": scores}
        (args.out / "outline-scores.json").write_text(json.dumps(report, indent=2) + "\n")
        labels = [f"{scene.caption()} [{weight:g}]" for scene in scenes[::11] for weight in args.weights]
        pictures = [drawn[weight][number] for number in range(0, len(scenes), 11) for weight in args.weights]
        labelled_grid(pictures, labels, 3 * len(args.weights)).save(args.out / "outline.png")


def draw(
    checkpoint: str, lora: str, scenes: Sequence[Scene], weights: Sequence[float], asked: Mapping[str, Any]
) -> dict[float, list[Image.Image]]:
    """Return by weight of the LoRA one picture of each scene; the same seeds for every weight.

    Args:
        checkpoint: its name.
        lora: its name.
        scenes: what the prompts say.
        weights: of the LoRA; jobs with a weight of 0 have no LoRA.
        asked: further parameters of every request.
    """
    from sdtpu_worker.diffusion import offline
    from sdtpu_worker.diffusion.cache import CompileCache
    from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
    from sdtpu_worker.diffusion.engine import Engine
    from sdtpu_worker.diffusion.sharding import find_devices

    options = LoadOptions(loras={"outline": lora}, lora_rank=RANK)
    engine = Engine(
        load_checkpoint(checkpoint, options=options), find_devices("cpu", 2), 8, compile_cache=CompileCache("auto")
    )
    jobs = []
    for weight, (number, scene) in itertools.product(weights, enumerate(scenes)):
        loras = (("outline", weight),) if weight else ()
        request = GenerationRequest(scene.caption(), seed=1_000 + number, loras=loras, **asked)
        jobs.append(engine.prepare(f"{weight} {number}", request))
    images = [Image.fromarray(image.pixels) for image in offline.generate(engine, jobs)]
    count = len(scenes)
    return {weight: images[i * count : (i + 1) * count] for i, weight in enumerate(weights)}


def without_rings(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> list[tuple[Scene, Image.Image]]:
    """Return the pictures of shapes that are not hollow by themselves, with their scenes."""
    return [(scene, picture) for scene, picture in zip(scenes, pictures, strict=True) if scene.shape != "ring"]


if __name__ == "__main__":
    main()
