"""Exact reuse on a real worker with the shipped checkpoint: bit for bit, in chains and groups; what is said of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import chain
from PIL import Image, ImageDraw

from sdtpu_worker import generate, generate_many, read_image_bytes
from tests.support.waiting import wait_until
from tests.worker.workers import start_worker

pytestmark = [pytest.mark.slow]
RED, BLUE = "a red circle on a white background", "a blue circle on a white background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reuse")


@pytest.fixture(scope="module")
def app_conf(folder) -> dict[str, Any]:
    return {"sdtpu_image_store": f"file://{folder}/images"}


@pytest.fixture(scope="module")
def log(redis_url, folder):
    settings = {"SDTPU_REUSE": "on", "SDTPU_IMAGE_STORE": f"file://{folder}/images", "SDTPU_CPU_DEVICES": "4"}
    with start_worker(redis_url, folder, SDTPU_HEALTH_ADDRESS="127.0.0.1:0", **settings) as (_, log):
        yield log


@pytest.fixture
def figures(log) -> Any:
    address = re.search(r"http://[\d.:]+", log.read_text())[0]

    def read(name: str) -> float:
        page = httpx.get(f"{address}/metrics", timeout=30).text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)[1])

    return read


def circle(colour: str) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=colour)
    return picture


def path_of(result: dict[str, Any]) -> Path:
    return Path(result["image"]["uri"].removeprefix("file://"))


def draw(prompt: str, **parameters: Any) -> dict[str, Any]:
    return generate.delay(prompt, num_inference_steps=8, **parameters).get(timeout=60)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_second_equal_job_has_the_same_bytes_without_a_tick(app, log, figures, image_format):
    first = draw(RED, seed=1, image_format=image_format)
    ticks = figures("sdtpu_ticks_total")
    second = draw(RED, seed=1, image_format=image_format)
    assert figures("sdtpu_ticks_total") == ticks
    assert [first["reused"], second["reused"]] == [False, True]
    assert read_image_bytes(first) == read_image_bytes(second)
    assert first["image"]["uri"] != second["image"]["uri"]
    path_of(first).unlink()
    assert path_of(second).exists(), "each can be deleted without the other"


def test_a_drawn_seed_makes_a_job_of_its_own(app, log):
    first = draw(RED)
    assert not draw(RED)["reused"]
    assert draw(RED, seed=first["seed"])["reused"]


def test_a_chain_that_runs_again_is_reused_as_a_whole_and_each_image_says_where_its_own_was(app, log, figures):
    def run() -> tuple[dict[str, Any], dict[str, Any]]:
        job = chain(
            generate.s(RED, seed=3, num_inference_steps=8),
            generate.s(prompt=BLUE, strength=0.8, seed=4, num_inference_steps=8),
        ).apply_async()
        return job.parent.get(timeout=60), job.get(timeout=60)

    (red, blue), ticks = run(), figures("sdtpu_ticks_total")
    red_again, blue_again = run()
    assert figures("sdtpu_ticks_total") == ticks
    assert [each["reused"] for each in (red, blue, red_again, blue_again)] == [False, False, True, True]
    assert blue_again["options"]["image"] == red_again["image"]["uri"] != red["image"]["uri"]
    for first, second in ((red, red_again), (blue, blue_again)):
        images = [Image.open(path_of(each)) for each in (first, second)]
        assert images[0].tobytes() == images[1].tobytes()
        assert getattr(images[1], "text", {}).get("image") == second["options"].get("image")


def test_many_pictures_share_what_they_have_in_common(app, log):
    first = generate_many(BLUE, 3, seed=50, num_inference_steps=8).get(timeout=60)
    second = generate_many(BLUE, 3, seed=51, num_inference_steps=8).get(timeout=60)
    assert [each["reused"] for each in first] == [False] * 3
    assert [(each["seed"], each["reused"]) for each in second] == [(51, True), (52, True), (53, False)]
    assert read_image_bytes(second[0]) == read_image_bytes(first[1])


def test_the_same_picture_counts_wherever_it_lies_and_another_one_does_not(app, log):
    stored = draw(RED, seed=60)
    options = {"seed": 61, "strength": 0.5}
    assert not draw(BLUE, image=stored, **options)["reused"]
    assert draw(BLUE, image=read_image_bytes(stored), **options)["reused"], "the same pixels, from the client"
    assert not draw(BLUE, image=circle("green"), **options)["reused"]


def test_the_log_and_the_figures_say_it(app, log, figures):
    before = figures('sdtpu_reuse_total{outcome="stored"}'), figures('sdtpu_reuse_total{outcome="drawn"}')
    reused = 'sdtpu_requests_total{outcome="succeeded",reason="reused"}'
    ends = figures(reused)
    draw(RED, seed=70)
    job = draw(RED, seed=70)
    line = f"task {job['task_id']} succeeded (reused): waited "
    wait_until(lambda: line in log.read_text(), "the job's line in the log")
    after = figures('sdtpu_reuse_total{outcome="stored"}'), figures('sdtpu_reuse_total{outcome="drawn"}')
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]
    wait_until(lambda: figures(reused) == ends + 1, "its end to be counted, which comes after its line")
