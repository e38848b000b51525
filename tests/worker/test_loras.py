"""Jobs with LoRAs of their own, on a real worker with the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import group
from PIL import ImageChops
from safetensors.numpy import load_file, save_file

from sdtpu_worker import InvalidRequest, generate, open_image
from tests.support.adapter_cases import lora_tensors
from tests.support.tiny_configs import SHIPPED
from tests.worker.workers import start_worker

pytestmark = [pytest.mark.slow]
ASKED = {"prompt": "a red circle on a white background", "seed": 3, "num_inference_steps": 10}


def write_lora(path: Path, layout: str) -> None:
    shapes = {
        part: {name: array.shape for file in (SHIPPED / part).glob("*.safetensors") for name, array in
               load_file(file).items()}
        for part in ("unet", "text_encoder")
    }  # fmt: skip
    save_file(lora_tensors(layout, shapes), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "first.safetensors", "kohya")
    return folder


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory, folder):
    more = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_LORAS": str(folder)}
    with start_worker(redis_url, tmp_path_factory.mktemp("worker"), **more) as started:
        yield started


def test_jobs_choose_loras_and_a_file_that_is_added_needs_no_restart(app, worker, folder):
    kinds = [[], ["first"], [["first", 0.5]]]
    alone = [generate.delay(**ASKED, loras=loras).get(timeout=60) for loras in kinds]
    assert [result["loras"] for result in alone] == [
        [], [{"name": "first", "weight": 1.0}], [{"name": "first", "weight": 0.5}],
    ]  # fmt: skip
    assert [result["options"] for result in alone] == [{}, {"loras": [["first", 1.0]]}, {"loras": [["first", 0.5]]}]
    pictures = [open_image(result) for result in alone]
    assert all(ImageChops.difference(pictures[0], other).getbbox() for other in pictures[1:])
    together = group(generate.s(**ASKED, loras=loras) for loras in kinds * 4).apply_async().get(timeout=120)
    for i, result in enumerate(together):
        assert not ImageChops.difference(open_image(result), pictures[i % 3]).getbbox()

    with pytest.raises(InvalidRequest, match=r"loras must be of first \(sdtpu_loras\), got 'second'"):
        generate.delay(**ASKED, loras=["second"]).get(timeout=60)
    write_lora(folder / "half", "peft")
    (folder / "half").rename(folder / "second.safetensors")
    both = generate.delay(**ASKED, loras=["first", ["second", -0.5]]).get(timeout=60)
    assert both["loras"] == [{"name": "first", "weight": 1.0}, {"name": "second", "weight": -0.5}]
