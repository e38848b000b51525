"""Score the shipped checkpoint: what share of its pictures shows what the prompt says, judged from pixels.

    python -m tools.embedded_checkpoint.score [--out DIR]
    python -m tools.embedded_checkpoint.score --checkpoint embedded-turbo --samplers lcm --steps 4 --guidance-scale 1

Chooses prompts whose combination of colour, shape and background was never trained on, generates an image of each with
every sampler, and has the judge in `scenes.py` read them. Takes about eight minutes on two cores for 200 prompts.
Prints one row per sampler; with `--out` it also writes `scores.json` and the contact sheet `samples.png`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.demo.command import labelled_grid
from tools.embedded_checkpoint.scenes import Scene, every_scene, judge

if TYPE_CHECKING:
    from sdtpu_worker.diffusion.engine import Engine

EVERY = 5  # one prompt in five is also generated with a second seed
SAMPLERS = ("pndm", "ddim", "euler", "dpmsolver++")
COLUMNS = ("colour", "background", "shape", "all three", "size", "position", "seeds differ")


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return different scenes that were never trained on, half of them with a size or a position word."""
    rng = random.Random(seed)
    scenes = [scene for scene in every_scene() if scene.held_out]
    plain = [scene for scene in scenes if scene.size is None and scene.position is None]
    worded = [scene for scene in scenes if scene not in plain]
    plain = rng.sample(plain, min(len(plain), count // 2))
    return plain + rng.sample(worded, count - len(plain))


def score(scenes: list[Scene], pictures: list[Image.Image], others: list[Image.Image]) -> dict[str, float]:
    """Return the share of pictures that are right, by column.

    Args:
        scenes: what the pictures should show.
        pictures: one picture of each scene.
        others: pictures of every fifth scene with another seed.
    """
    hits: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for scene, picture in zip(scenes, pictures, strict=True):
        seen = judge(picture)
        right = [seen.colour == scene.colour, seen.background == scene.background, seen.shape == scene.shape]
        for column, hit in zip(COLUMNS, [*right, all(right)], strict=False):
            hits[column].append(hit)
        if scene.size:
            hits["size"].append(seen.agrees_on_size(scene.size))
        if scene.position:
            hits["position"].append(seen.agrees_on_position(scene.position))
    for picture, other in zip(pictures[::EVERY], others, strict=True):
        difference = np.abs(np.asarray(picture, np.float32) - np.asarray(other, np.float32)).max(-1)
        hits["seeds differ"].append(bool((difference > 64).mean() > 0.01))
    return {column: round(float(np.mean(found)), 4) for column, found in hits.items()}


def generate(engine: Engine, scenes: list[Scene], seed: int, options: Mapping[str, Any]) -> list[Image.Image]:
    """Return one picture of each scene.

    Args:
        engine: an engine of the checkpoint.
        scenes: what the prompts say.
        seed: of the first picture; each further one has the next number.
        options: further parameters of every request.
    """
    from sdtpu_worker.diffusion import offline

    requests = [GenerationRequest(scene.caption(), seed=seed + i, **options) for i, scene in enumerate(scenes)]
    jobs = [engine.prepare(str(i), request) for i, request in enumerate(requests)]
    return [Image.fromarray(image.pixels) for image in offline.generate(engine, jobs)]


def main() -> None:
    """Generate the images, judge them and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="embedded", help="folder; default: the shipped one")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, help="samplers to compare")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per sampler")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="guidance")
    parser.add_argument("--out", type=Path, help="folder for scores.json and samples.png")
    args = parser.parse_args()
    from sdtpu_worker.diffusion.checkpoint import load_checkpoint
    from sdtpu_worker.diffusion.engine import Engine
    from sdtpu_worker.diffusion.sharding import find_devices

    engine = Engine(load_checkpoint(args.checkpoint), find_devices("cpu", 2), slots_per_device=16)
    scenes = held_out_scenes(args.prompts)

    print(f"{'sampler':<12}", *(f"{column:>12}" for column in COLUMNS))
    scores: dict[str, dict[str, float]] = {}
    misses: list[str] = []
    sheet: list[Any] = []
    for sampler in args.samplers:
        options = {"sampler": sampler, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
        pictures = generate(engine, scenes, 1_000, options)
        scores[sampler] = score(scenes, pictures, generate(engine, scenes[::EVERY], 9_000, options))
        print(f"{sampler:<12}", *(f"{100 * scores[sampler][column]:>11.1f}%" for column in COLUMNS), flush=True)
        for scene, picture in zip(scenes, pictures, strict=True):
            seen = judge(picture)
            if (seen.colour, seen.shape, seen.background) != (scene.colour, scene.shape, scene.background):
                misses.append(f"{sampler}: {scene.caption()}: {seen.colour} {seen.shape} on {seen.background}")
        sheet += [
            (picture, f"{scene.caption()} [{sampler}]")
            for picture, scene in list(zip(pictures, scenes, strict=True))[::17]
        ]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"prompts": args.prompts, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
        report = {**facts, "scores": scores, "misses": misses}
        (args.out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
        labelled_grid([picture for picture, _ in sheet], [label for _, label in sheet], 8).save(
            args.out / "samples.png"
        )


if __name__ == "__main__":
    main()
