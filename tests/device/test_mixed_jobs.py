"""Two hundred jobs of every kind at once: each draws what it draws alone, and nothing is compiled for any of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob
from tests.support import picture_cases
from tests.support.adapter_cases import LAYOUTS, lora_tensors
from tests.support.checkpoints import make_random_checkpoint, make_random_controlnet
from tests.support.engines import run_alone
from tests.support.picture_cases import make_image, make_mask

JOBS = 200
NAMED = "redis:sdtpu:image:x"
SAMPLERS = ("pndm", "ddim", "euler", "euler_ancestral", "heun", "dpmsolver++", "unipc", "lcm")
PROMPTS = ("a red circle", "a small blue star on a white background", "two hearts")


@dataclass(frozen=True)
class Asked:
    """One job: what is asked for, and its pictures by parameter.

    Attributes:
        kind: the words for what it is.
        parameters: of the request.
        pictures: as the worker decodes them.
    """

    kind: str
    parameters: dict[str, Any]
    pictures: dict[str, Any]

    def prepare(self, engine: Engine, task_id: str) -> PreparedJob:
        return engine.prepare(task_id, GenerationRequest(**self.parameters), self.pictures)


def draw_job(random: Random) -> Asked:
    """Return a job of a random kind; LoRAs and ControlNets go with pictures and masks too."""
    base = random.choice(("text", "image", "mask"))
    parameters: dict[str, Any] = {
        "prompt": random.choice(PROMPTS),
        "negative_prompt": random.choice(("", "a ring")),
        "sampler": random.choice(SAMPLERS),
        "num_inference_steps": random.randint(3, 9),
        "guidance_scale": random.choice((1.0, 3.0, 7.5)),
        "seed": random.randrange(2**32),
    }
    pictures: dict[str, Any] = {}
    if base != "text":
        pictures["image"] = make_image(random.randrange(3))
        parameters |= {"image": NAMED, "strength": random.choice((0.4, 0.8, 1.0))}
    if base == "mask":
        pictures["mask_image"] = make_mask(random.randrange(3))
        parameters |= {"mask_image": NAMED, "preserve_unmasked": random.random() < 0.5}
    loras = random.choice((0, 0, 1, 2))
    if loras:
        names = random.sample(LAYOUTS, loras)
        parameters["loras"] = [(name, random.choice((-0.5, 0.5, 1.0))) for name in names]
    controls = random.choice((0, 0, 1, 2))
    if controls:
        pictures["control_image"] = [make_image(random.randrange(3, 6)) for _ in range(controls)]
        parameters |= {
            "controlnet": random.sample(picture_cases.CONTROL_NAMES, controls),
            "control_image": [NAMED] * controls,
            "controlnet_conditioning_scale": random.choice((0.5, 1.0)),
            "control_guidance_end": random.choice((0.6, 1.0)),
        }
    return Asked(f"{base}, {loras} LoRAs, {controls} ControlNets", parameters, pictures)


@pytest.fixture(scope="module")
def engine(devices, compile_cache, tmp_path_factory) -> Engine:
    """Give a tiny checkpoint with room for LoRAs, three of them and two ControlNets, on four slots."""
    folder = tmp_path_factory.mktemp("mixed") / "checkpoint"
    make_random_checkpoint(folder, unet=dict(picture_cases.MODELS["control"]))
    shapes = {
        part: {name: array.shape for file in (folder / part).glob("*.safetensors") for name, array in
               load_file(file).items()}
        for part in ("unet", "text_encoder")
    }  # fmt: skip
    (folder / "loras").mkdir()
    for layout in LAYOUTS:
        save_file(lora_tensors(layout, shapes), folder / "loras" / f"{layout}.safetensors")
    controlnets = {
        name: str(make_random_controlnet(folder / name, picture_cases.CONTROLNETS["control"], name))
        for name in picture_cases.CONTROL_NAMES
    }
    options = LoadOptions(controlnets=controlnets, loras=str(folder / "loras"), lora_rank=8)
    return Engine(load_checkpoint(str(folder), options=options), devices[:2], 2, None, compile_cache)


def test_two_hundred_jobs_of_all_kinds_draw_what_each_draws_alone_and_nothing_is_compiled(engine):
    random = Random(13)
    asked = [draw_job(random) for _ in range(JOBS)]
    jobs = {str(i): each.prepare(engine, str(i)) for i, each in enumerate(asked)}
    drawn = generate(engine, list(jobs.values()), steps_per_tick=3)
    together = {image.task_id: jobs[image.task_id].finish(image.pixels) for image in drawn}
    engine.reset()
    wrong = []
    for i, each in enumerate(asked):
        job = each.prepare(engine, "alone")
        first = random.randint(1, job.num_steps)
        image = run_alone(engine, job, i % 2, i // 2 % 2, (first, job.num_steps - first))
        assert image.finite
        if not np.array_equal(job.finish(image.pixels), together[str(i)]):
            wrong.append(each.kind)
    assert not wrong, f"{len(wrong)} of {JOBS} jobs drew something else alone: {Counter(wrong)}"
    assert len({pixels.tobytes() for pixels in together.values()}) == JOBS
    assert len({each.kind for each in asked}) == 27
    assert engine.traces_since_ready == 0
