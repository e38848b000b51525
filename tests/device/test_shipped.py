"""The checkpoints that the package brings draw what prompts say, on prompts that they were not trained on."""

from __future__ import annotations

import pytest
from PIL import Image

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.loading.lora_files import EMBEDDED_LORAS, find_lora
from sdtpu_worker.errors import InvalidCheckpoint
from tests.support.engines import generate_all
from tools.embedded_checkpoint.score import held_out_scenes, score
from tools.embedded_checkpoint.score_outline import score as score_outlines


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


@pytest.mark.slow
def test_the_shipped_lora_draws_outlines_of_what_the_prompt_says(devices, compile_cache):
    options = LoadOptions(loras={"outline": "embedded-outline"}, lora_rank=4)
    engine = Engine(load_checkpoint("embedded", options=options), devices[:2], 2, None, compile_cache)
    scenes = [scene for scene in held_out_scenes(60) if scene.shape in ("circle", "square", "heart")][:24]
    requests = [
        GenerationRequest(scene.caption(), seed=i, num_inference_steps=30, loras=loras)
        for loras in ((), (("outline", 1.0),))
        for i, scene in enumerate(scenes)
    ]
    pictures = [Image.fromarray(image.pixels) for image in generate_all(engine, requests)]
    without, with_it = (score_outlines(scenes, pictures[i : i + len(scenes)]) for i in (0, len(scenes)))
    assert without["outlined"] == 0
    assert with_it["outlined"] >= 0.8
    assert min(found[part] for found in (without, with_it) for part in ("colour", "background", "shape")) >= 0.85


@pytest.mark.parametrize("checkpoint", ["embedded", "embedded-turbo"])
def test_the_shipped_lora_is_found_by_its_name_and_fits_the_shipped_checkpoints(checkpoint):
    options = LoadOptions(loras={"outline": "embedded-outline"}, lora_rank=4)
    files = load_checkpoint(checkpoint, options=options).adapters
    assert files.names() == ["outline"]
    assert files.load([("outline", 1.0)]).key != files.load([("outline", 0.5)]).key
    assert EMBEDDED_LORAS.keys() == {"embedded-outline"}
    assert find_lora("embedded-outline").stat().st_size < 100_000
    with pytest.raises(InvalidCheckpoint, match="the package brings embedded-outline"):
        find_lora("embedded-outlined")


def test_a_shipped_checkpoint_is_small():
    for name, most in (("embedded", 6.5e6), ("embedded-turbo", 6e6)):
        folder = find_folder(name, "main")
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.suffix != ".png") <= most
