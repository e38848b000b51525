"""Weighted and long prompts, and words of textual inversion, through Celery on a real worker."""

from __future__ import annotations

import numpy as np
import pytest
from celery import group
from PIL import ImageChops
from safetensors.numpy import load_file, save_file

from sdtpu_worker import InvalidRequest, generate, open_image
from tests.support.tiny_configs import SHIPPED
from tests.worker.workers import start_worker

pytestmark = [pytest.mark.slow]
ASKED = {"seed": 3, "num_inference_steps": 10}


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory):
    """Run a worker for which `crimson` stands for the vector of `red`."""
    folder = tmp_path_factory.mktemp("words")
    (file,) = (SHIPPED / "text_encoder").glob("*.safetensors")
    table = load_file(file)["text_model.embeddings.token_embedding.weight"]
    save_file({"emb_params": np.stack([table[_id_of("red")]] * 2)}, folder / "crimson.safetensors")
    more = {
        "SDTPU_CPU_DEVICES": "2",
        "SDTPU_SLOTS_PER_DEVICE": "2",
        "SDTPU_PROMPT_WINDOWS": "2",
        "SDTPU_EMBEDDINGS": str(folder),
    }
    with start_worker(redis_url, tmp_path_factory.mktemp("worker"), **more) as started:
        yield started


def _id_of(word: str) -> int:
    from sdtpu_worker.diffusion.tokens import PromptTokenizer

    (token,) = PromptTokenizer.from_folder(SHIPPED / "tokenizer", 77).ids(word, 1000)
    return token


def test_jobs_choose_how_their_prompts_are_read(app, worker):
    weighted = {"prompt_syntax": "weighted"}
    kinds = [
        {"prompt": "a red circle on a white background"},
        {"prompt": "a red circle on a white background", **weighted},
        {"prompt": "a (red:1.5) circle on a [white] background", **weighted},
        {"prompt": "a red circle BREAK on a white background", "negative_prompt": "(star:1.2)", **weighted},
        {"prompt": "a red red circle on a white background"},
        {"prompt": "a Crimson circle on a white background"},
    ]
    alone = [generate.delay(**ASKED, **kind).get(timeout=120) for kind in kinds]
    assert [result["options"] for result in alone] == [{}, weighted, weighted, weighted, {}, {}]
    pictures = [open_image(result) for result in alone]
    same = [[not ImageChops.difference(one, other).getbbox() for other in pictures] for one in pictures]
    equal = np.eye(6, dtype=bool)
    equal[0, 1] = equal[1, 0] = equal[4, 5] = equal[5, 4] = True
    assert same == equal.tolist()
    together = group(generate.s(**ASKED, **kind) for kind in kinds * 3).apply_async().get(timeout=240)
    for i, result in enumerate(together):
        assert not ImageChops.difference(open_image(result), pictures[i % 6]).getbbox()
    with pytest.raises(InvalidRequest, match=r"at most 2 windows of 75 tokens .* got 17 characters"):
        generate.delay("a BREAK b BREAK c", **ASKED, **weighted).get(timeout=60)
    with pytest.raises(InvalidRequest, match="prompt must have weights from -100 to 100, got 1000"):
        generate.delay("a (b:1000)", **ASKED, **weighted)
