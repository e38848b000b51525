"""A kind of model that nobody has heard of runs in the programs, slots and snapshots that serve Stable Diffusion."""

from __future__ import annotations

import numpy as np
import pytest

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.engine import Engine
from tests.support.colour_family import COLOURS, Colour, colour_checkpoint
from tests.support.engines import generate_all, run_alone


@pytest.fixture(scope="module")
def colour_engine(devices):
    return Engine(colour_checkpoint(Colour()), devices[:2], 2)


def test_a_new_family_draws_parks_and_resumes_without_a_change_to_the_programs(colour_engine):
    requests = [GenerationRequest(name, seed=i, num_inference_steps=4 + i) for i, name in enumerate(COLOURS)]
    images = generate_all(colour_engine, requests)
    for image, rgb in zip(images, COLOURS.values(), strict=True):
        assert image.pixels.shape == (4, 6, 3)
        assert np.abs(image.pixels / 127.5 - 1 - np.array(rgb)).max() < 0.01
    job = colour_engine.prepare("it", requests[0])
    reference = run_alone(colour_engine, job, 0, 0, [4]).pixels
    run_alone(colour_engine, job, 0, 1, [2])
    snapshot = colour_engine.read_snapshot(colour_engine.snapshot(job.lane, 0, 1).to_bytes(), job)
    assert snapshot.step == 2
    np.testing.assert_array_equal(reference, images[0].pixels)
