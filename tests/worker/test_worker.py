"""Real worker processes on a real Redis: what a user of Celery must be able to rely on."""

from __future__ import annotations

import io
import json
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from celery import Celery, chain, chord, group
from PIL import Image

from sdtpu_worker import GenerationFailed, GenerationResult, InvalidRequest, StorageError, generate, open_image
from sdtpu_worker.images.store import read_image_bytes
from tests.support.engines import generate_all
from tests.support.waiting import wait_until
from tests.worker.workers import start_worker
from tools.embedded_checkpoint.scenes import judge

pytestmark = [pytest.mark.slow]


def queue_length(app, queue: str) -> int:
    with app.connection_for_read() as connection:
        return connection.default_channel._size(queue)


PROMPT = "a large blue circle on a yellow background"


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory):
    """Run the shipped checkpoint on eight devices, images in Redis."""
    with start_worker(redis_url, tmp_path_factory.mktemp("worker"), "-Q", "sdtpu,shared") as started:
        yield started


@pytest.fixture(scope="module")
def file_worker(redis_url, tmp_path_factory, random_checkpoint):
    """Run a second host: a random checkpoint on two devices, images in files; yields the folder of images."""
    folder = tmp_path_factory.mktemp("file-worker")
    settings = {
        "SDTPU_QUEUE": "files",
        "SDTPU_CPU_DEVICES": "2",
        "SDTPU_SLOTS_PER_DEVICE": "2",
        "SDTPU_MODEL": str(random_checkpoint),
        "SDTPU_IMAGE_STORE": f"file://{folder}/images",
    }
    with start_worker(redis_url, folder, "-Q", "files,shared", **settings):
        yield folder / "images"


def test_a_prompt_comes_back_as_the_picture_that_the_engine_makes_of_it(app, worker, engine):
    job = generate.delay(PROMPT, seed=7, num_inference_steps=30, sampler="ddim", negative_prompt="")
    result = job.get(timeout=60)
    assert result["task_id"] == job.id
    assert json.loads(json.dumps(result)) == result
    assert {**result, "timings": 0, "batch": 0, "image": 0} == {
        "task_id": job.id,
        "image": 0,
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 7,
        "seed_text": "7",
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "sampler": "ddim",
        "model": "embedded",
        "prompt_truncated": False,
        "nsfw_content_detected": None,
        "timings": 0,
        "batch": 0,
        "options": {},
        "loras": [],
        "reused": False,
    }
    parsed = GenerationResult.from_json(result)
    assert (parsed.image.format, parsed.image.width, parsed.image.height) == ("png", 64, 64)
    assert parsed.batch.num_slots == 8
    assert 0 < parsed.timings.device_s < parsed.timings.total_s
    image = open_image(result)
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert (image.info["prompt"], image.info["seed"], image.info["sampler"]) == (PROMPT, "7", "ddim")
    assert not {"task_id", "timings"} & set(image.info)
    assert len(read_image_bytes(result)) == parsed.image.bytes
    from sdtpu_worker import GenerationRequest

    (own,) = generate_all(engine, [GenerationRequest(PROMPT, seed=7, num_inference_steps=30, sampler="ddim")])
    np.testing.assert_array_equal(np.asarray(image), own.pixels)
    verdict = judge(image)
    assert (verdict.colour, verdict.shape, verdict.background) == ("blue", "circle", "yellow")


def test_the_same_request_gives_the_same_bytes_in_other_company(app, worker):
    def order(**options):
        return generate.delay(PROMPT, seed=2**62 + 1, num_inference_steps=8, **options)

    alone = order().get(timeout=60)
    neighbours = [generate.delay("a red star", num_inference_steps=3 + i % 9) for i in range(20)]
    crowd = [order().get(timeout=60) for _ in range(3)]
    assert {read_image_bytes(result) for result in [alone, *crowd]} == {read_image_bytes(alone)}
    for neighbour in neighbours:
        neighbour.get(timeout=60)


def test_sixty_four_jobs_at_once_keep_all_devices_busy_and_each_gets_its_own_picture(app, worker):
    ahead = [generate.delay("a red star", num_inference_steps=300) for _ in range(8)]  # while the others are sent
    jobs = [generate.delay("a red circle on a white background", seed=i, num_inference_steps=30) for i in range(64)]
    assert not any(job.ready() for job in ahead)
    results = [job.get(timeout=120) for job in jobs]
    assert [result["task_id"] for result in results] == [job.id for job in jobs]
    assert [result["seed"] for result in results] == list(range(64))
    for i, result in enumerate(results):
        assert open_image(result).info["seed"] == str(i)
    occupied = Counter(result["batch"]["occupied"] for result in results)
    assert sum(count for number, count in occupied.items() if number < 8) <= 16, "but for the first and the last batch"
    assert {result["batch"]["device"] for result in results} == set(range(8))


def test_group_chord_and_chain_work_as_for_any_task(app, worker):
    results = group(generate.s("a red star", seed=i, num_inference_steps=2) for i in range(5)).delay().get(timeout=60)
    assert [result["seed"] for result in results] == list(range(5))
    header = [generate.s("a blue ring", seed=i, num_inference_steps=2) for i in range(3)]
    result = chord(header)(generate.si("a green heart", seed=9, num_inference_steps=2)).get(timeout=60)
    assert (result["prompt"], result["seed"]) == ("a green heart", 9)
    pair = chain(generate.s("a", seed=1, num_inference_steps=1), generate.si("b", seed=2, num_inference_steps=1))
    assert pair.delay().get(timeout=60)["prompt"] == "b"
    broken = chain(generate.s("a", seed=1, num_inference_steps=1), generate.s(seed=2)).delay()
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        broken.get(timeout=60)
    assert broken.parent.get(timeout=60)["prompt"] == "a"


def test_a_foreign_client_needs_only_celerys_protocol(redis_url, worker):
    foreign = Celery("foreign", broker=redis_url, backend=redis_url, set_as_current=False)
    job = foreign.send_task("sdtpu.generate", ["a fox"], {"seed": 7, "num_inference_steps": 2}, queue="sdtpu")
    assert job.get(timeout=60)["seed"] == 7
    ids = ["11111111-fixed", "22222222-fixed"]
    seeds = [
        foreign.send_task(
            "sdtpu.generate", ["a fox"], {"num_inference_steps": 1}, queue="sdtpu", task_id=f"{i}-{uuid.uuid4()}"
        ).get(timeout=60)["seed"]
        for i in ids
    ]
    assert len(set(seeds)) == 2
    foreign.close()


def test_bad_input_in_the_middle_of_a_batch_fails_alone(redis_url, app, worker):
    foreign = Celery("foreign", broker=redis_url, backend=redis_url, set_as_current=False)

    def send(*args, **kwargs):
        return foreign.send_task("sdtpu.generate", args, kwargs, queue="sdtpu")

    good = [generate.delay("a red circle", seed=i, num_inference_steps=4) for i in range(6)]
    bad = [
        send(),
        send(""),
        send({"prompt": "a"}),
        send("a", num_inference_steps=10**9),
        send("a", guidance_scale="NaN"),
        send("a", height=63),
        send("a", height=128, width=128),
        send("a", sampler="nonesuch"),
        send("a", stepz=1),
        send("x" * 20_000),
    ]
    good += [generate.delay("a red circle", seed=i, num_inference_steps=4) for i in range(6)]
    for job in good:
        assert job.get(timeout=60)["prompt"] == "a red circle"
    for job in bad:
        with pytest.raises(InvalidRequest):
            app.AsyncResult(job.id).get(timeout=60)
    foreign.close()


def test_a_size_that_is_not_configured_names_those_that_are(app, worker):
    job = generate.delay("a fox", height=512, width=512)
    with pytest.raises(InvalidRequest, match=r"height x width must be one of 64x64 \(sdtpu_resolutions\), got 512x512"):
        job.get(timeout=60)


def test_a_long_prompt_is_cut_and_reported(app, worker):
    result = generate.delay("red " * 500, num_inference_steps=1).get(timeout=60)
    assert result["prompt_truncated"] is True


@pytest.mark.parametrize(("image_format", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_what_they_say(app, worker, image_format, name):
    result = generate.delay("a red circle", num_inference_steps=1, image_format=image_format).get(timeout=60)
    assert open_image(result).format == name
    assert result["image"]["format"] == image_format


def test_images_in_redis_expire_with_their_results(app, worker):
    result = generate.delay("a red circle", num_inference_steps=1).get(timeout=60)
    key = result["image"]["uri"].removeprefix("redis:")
    client = app.backend.client
    assert 0 < client.ttl(key) <= 24 * 3600
    client.delete(key)
    with pytest.raises(StorageError, match="expired"):
        open_image(result)


def test_images_in_files_are_named_by_their_task_even_if_its_id_is_hostile(app, file_worker, monkeypatch):
    monkeypatch.setenv("SDTPU_READ_IMAGE_STORES", f"file://{file_worker}")
    result = generate.apply_async(("a fox",), {"seed": 3, "num_inference_steps": 2}, queue="files").get(timeout=60)
    path = file_worker / f"{result['task_id']}.png"
    assert result["image"]["uri"] == f"file://{path}"
    assert Image.open(io.BytesIO(path.read_bytes())).size == open_image(result).size == (8, 8)
    hostile = generate.apply_async(
        ("a fox",), {"num_inference_steps": 1}, queue="files", task_id=f"../../{uuid.uuid4()}"
    ).get(timeout=60)
    assert Path(hostile["image"]["uri"].removeprefix("file://")).parent == file_worker
    assert open_image(hostile).size == (8, 8)


def test_two_workers_share_a_queue(app, worker, file_worker):
    jobs = [generate.apply_async(("a fox",), {"num_inference_steps": 40}, queue="shared") for _ in range(48)]
    results = [job.get(timeout=120) for job in jobs]
    assert [result["task_id"] for result in results] == [job.id for job in jobs]
    hosts = Counter(result["image"]["uri"].split(":")[0] for result in results)
    assert set(hosts) == {"redis", "file"}, hosts


def test_states_and_pool_facts_are_visible_as_for_any_worker(app, worker):
    task_id, states = str(uuid.uuid4()), ["PENDING"]
    assert app.AsyncResult(task_id).state == "PENDING"
    with app.backend.client.pubsub(ignore_subscribe_messages=True) as published:  # where each state is, however short
        published.subscribe(app.backend.get_key_for_task(task_id))
        published.parse_response()
        generate.apply_async(("a red circle",), {"num_inference_steps": 400}, task_id=task_id)
        while states[-1] != "SUCCESS":
            message = wait_until(lambda: published.get_message(timeout=1), f"what comes after {states}")
            state = json.loads(message["data"])["status"]
            states += [state] if state != states[-1] else []
    assert states == ["PENDING", "STARTED", "PROGRESS", "SUCCESS"]
    assert app.AsyncResult(task_id).state == "SUCCESS"
    stats = next(
        s for s in app.control.inspect(timeout=10).stats().values() if s["pool"].get("sdtpu", {}).get("slots") == 8
    )
    assert stats["pool"]["max-concurrency"] == 16
    assert stats["prefetch_count"] == 16
    assert stats["pool"]["sdtpu"]["loop"]["images"] >= 1
    assert stats["pool"]["sdtpu"]["traces_since_ready"] == 0


def test_sigterm_finishes_the_jobs_in_hand_and_exits_with_zero(redis_url, app, tmp_path, random_checkpoint):
    settings = {"SDTPU_QUEUE": "drained", "SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2"}
    settings |= {"SDTPU_MODEL": str(random_checkpoint), "SDTPU_GRACE_S": "100"}
    with start_worker(redis_url, tmp_path, "-Q", "drained", **settings) as (process, _):
        jobs = [generate.apply_async(("a",), {"num_inference_steps": 100}, queue="drained") for _ in range(8)]
        wait_until(lambda: not queue_length(app, "drained") and jobs[0].state != "PENDING", "all jobs to be taken")
        process.terminate()
        assert process.wait(120) == 0
    assert {job.get(timeout=60)["num_inference_steps"] for job in jobs} == {100}


def test_a_failure_crosses_the_result_backend_with_its_own_class(app):
    app.backend.store_result("failed-one", GenerationFailed("device 3 gave NaN"), "FAILURE")
    with pytest.raises(GenerationFailed, match="device 3 gave NaN"):
        app.AsyncResult("failed-one").get(timeout=60)
