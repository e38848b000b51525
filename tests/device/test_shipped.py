"""The checkpoints that the package brings draw what prompts say, on prompts that they were not trained on."""

from __future__ import annotations

import pytest
from PIL import Image

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.engine import Engine
from tests.support.engines import generate_all
from tools.embedded_checkpoint.score import held_out_scenes, score


@pytest.mark.slow
def test_the_distilled_checkpoint_draws_in_four_steps_and_without_guidance(devices, compile_cache):
    checkpoint = load_checkpoint("embedded-turbo")
    assert (checkpoint.defaults.num_inference_steps, checkpoint.defaults.guidance_scale) == (4, 1.0)
    assert checkpoint.family.rows == 1, "compiled without the half for negative prompts"
    engine = Engine(checkpoint, devices[:2], 8, None, compile_cache)
    scenes = held_out_scenes(40)
    requests = [GenerationRequest(scene.caption(), seed=i) for i, scene in enumerate(scenes)]
    pictures = [Image.fromarray(image.pixels) for image in generate_all(engine, requests)]
    found = score(scenes, pictures, pictures[::5])
    assert found["colour"] == found["background"] == 1
    assert found["all three"] >= 0.9


def test_a_shipped_checkpoint_is_small():
    for name, most in (("embedded", 6.5e6), ("embedded-turbo", 6e6)):
        folder = find_folder(name, "main")
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.suffix != ".png") <= most
