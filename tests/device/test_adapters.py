"""LoRAs of single jobs: equal to PyTorch's pipelines, to themselves in any company, and found without a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob
from tests.support import adapter_cases
from tests.support.adapter_cases import LAYOUTS, MODELS, lora_tensors
from tests.support.checkpoints import make_random_checkpoint
from tests.support.engines import run_alone

GOLDEN = Path(__file__).parent / "golden"
CASES = adapter_cases.cases()
PARTS = ("unet", "text_encoder", "text_encoder_2")


def write_loras(folder: Path, checkpoint: Path) -> Path:
    """Write one LoRA for each layout; return the folder."""
    folder.mkdir()
    shapes = {}
    for part in PARTS:
        for path in (checkpoint / part).glob("*.safetensors"):
            shapes[part] = {name: array.shape for name, array in load_file(path).items()}
    for layout in LAYOUTS:
        save_file(lora_tensors(layout, shapes), folder / f"{layout}.safetensors")
    return folder


def make_engine(model, devices, compile_cache, folder, slots=2, rank=8) -> Engine:
    make_random_checkpoint(folder, xl=model == "xl", unet=dict(MODELS[model]))
    options = LoadOptions(loras=str(write_loras(folder / "loras", folder)), lora_rank=rank)
    return Engine(load_checkpoint(str(folder), options=options), devices[:2], slots, None, compile_cache)


@pytest.fixture(scope="module", params=["sd", "xl"])
def engine(request, devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine(request.param, devices, compile_cache, tmp_path_factory.mktemp("adapters") / request.param)


def ask(engine: Engine, task_id: str, loras=(), **parameters) -> PreparedJob:
    asked: dict[str, Any] = {"num_inference_steps": 6, "seed": 5, "sampler": "ddim", **parameters}
    return engine.prepare(task_id, GenerationRequest("a red circle", loras=loras, **asked))


def test_jobs_with_different_loras_and_with_none_draw_together_what_they_draw_alone(engine):
    kinds: list[dict[str, Any]] = [
        {},
        {"loras": ["kohya"]},
        {"loras": [("kohya", 0.5)], "num_inference_steps": 9},
        {"loras": [["diffusers", 1.0], ["peft", -0.5]]},
        {"loras": [("peft", 2)], "sampler": "euler_ancestral"},
    ]
    jobs = [ask(engine, str(i), **kind) for i, kind in enumerate(kinds * 4)]
    together = {image.task_id: image.pixels for image in generate(engine, jobs, steps_per_tick=2)}
    for i, kind in enumerate(kinds):
        job = ask(engine, "alone", **kind)
        for device, slot in ((0, 1), (1, 0)):
            alone = run_alone(engine, job, device, slot, [1] * job.num_steps).pixels
            for j in range(i, len(jobs), len(kinds)):
                np.testing.assert_array_equal(together[str(j)], alone)
    assert len({together[str(i)].tobytes() for i in range(len(kinds))}) == len(kinds)
    assert engine.traces_since_ready == 0
