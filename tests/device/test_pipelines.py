"""The whole way, from a request to pixels, against what PyTorch's pipelines draw (`tools/oracle/pipelines.py`).

The noise is the same on both sides. Within a family all cases run in one compiled program, mixed, whatever their
samplers, prediction types and numbers of steps are.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob, prepare_job
from sdtpu_worker.diffusion.samplers import NoiseSchedule
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from tests.support import pipeline_cases as pictures
from tests.support.checkpoints import make_random_checkpoint
from tests.support.engines import generate_all
from tools.oracle.noise import draw_all

GOLDEN = Path(__file__).parent / "golden"
CASES = pictures.cases()
FAMILIES = list(pictures.FAMILIES)


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, np.ndarray]:
    with np.load(GOLDEN / "pipelines.npz") as file:
        pixels, runs = file["pixels"], file["runs"]
    assert len(pixels) == len(CASES), "run tools/oracle/pipelines.py again: the cases have changed"
    return pixels, runs


@pytest.fixture(scope="module", params=FAMILIES)
def engine_of_family(request, devices, compile_cache, tmp_path_factory) -> tuple[str, Engine]:
    family = request.param
    folder = tmp_path_factory.mktemp("pipelines") / "checkpoint"
    make_random_checkpoint(folder, xl=family == "xl", unet=dict(pictures.FAMILIES[family]))
    return family, Engine(load_checkpoint(str(folder)), devices[:2], 8, None, compile_cache)


def prepare(engine: Engine, number: int) -> PreparedJob:
    """Return the job of a case: the engine's, with the scheduler config of the case for the checkpoint's own."""
    case = CASES[number]
    schedule = NoiseSchedule.from_config(case.scheduler, corrects_outdated=case.family != "xl")
    checkpoint = dataclasses.replace(engine.checkpoint, schedule=schedule)
    checkpoint = dataclasses.replace(
        checkpoint, defaults=dataclasses.replace(checkpoint.defaults, sampler=schedule.default_sampler)
    )
    request = GenerationRequest(**case.request, seed=pictures.SEEDS[case.family])
    return prepare_job(checkpoint, engine.info.resolutions, str(number), request, None, {})


def decibels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio."""
    error = np.mean((ours.astype(float) - theirs) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.slow
def test_pictures_are_those_of_pytorchs_pipelines(engine_of_family, golden):
    family, engine = engine_of_family
    pixels, runs = golden
    numbers = [i for i, case in enumerate(CASES) if case.family == family and runs[i]]
    images = generate(engine, [prepare(engine, i) for i in numbers], steps_per_tick=50)
    wrong = defaultdict(list)
    for i, image in zip(numbers, images, strict=True):
        most = np.abs(image.pixels.astype(int) - pixels[i]).max()
        if most > 2 or decibels(image.pixels, pixels[i]) < 55:
            wrong[CASES[i].scheduler["_class_name"]].append((most, str(CASES[i])))
    assert not wrong, f"{sum(map(len, wrong.values()))} of {len(numbers)} differ"


def test_a_case_that_pytorch_does_not_run_is_refused_or_makes_a_picture(engine_of_family, golden):
    family, engine = engine_of_family
    _, runs = golden
    for i, case in enumerate(CASES):
        if case.family != family or runs[i]:
            continue
        said = ""
        try:
            assert np.isfinite(prepare(engine, i).table).all(), case
        except (InvalidRequest, InvalidCheckpoint) as exc:
            said = str(exc)
        assert not said or "must be" in said or "makes no picture" in said, (case, said)


@pytest.mark.parametrize("sampler", pictures.SHIPPED_SAMPLERS)
def test_the_shipped_checkpoint_draws_what_pytorchs_pipeline_draws(engine, sampler):
    theirs = np.asarray(Image.open(GOLDEN / f"shipped-{sampler}.png")).reshape(-1, 64, 64, 3)
    images = generate_all(
        engine,
        [
            GenerationRequest(
                prompt,
                seed=seed,
                num_inference_steps=pictures.SHIPPED_STEPS,
                guidance_scale=pictures.SHIPPED_GUIDANCE_SCALE,
                sampler=sampler,
            )
            for seed, prompt in enumerate(pictures.SHIPPED_PROMPTS)
        ],
    )
    ours = np.stack([image.pixels for image in images])
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    assert decibels(ours, theirs) >= 55


def test_the_recorded_noise_is_what_jax_draws():
    with np.load(GOLDEN / "noise.npz") as file:
        recorded = dict(file)
    drawn = draw_all()
    assert recorded.keys() == drawn.keys(), "run tools/oracle/noise.py again: the cases have changed"
    for name, noise in drawn.items():
        np.testing.assert_allclose(recorded[name], noise, rtol=0, atol=1e-6)


def test_the_golden_pictures_tell_one_case_from_another(golden):
    """Grey or saturated pictures, or one for all cases, would agree with anything."""
    pixels, runs = golden
    drawn = pixels[runs].astype(float)
    inside = (drawn > 0) & (drawn < 255)
    assert np.median(inside.mean((1, 2, 3))) > 0.5
    assert np.median(drawn.std((1, 2, 3))) > 20
