"""A running job under Celery's control: progress, priorities, revokes and limits, on a real worker."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from sdtpu_worker import generate, open_image
from tests.support.waiting import wait_until
from tests.worker.workers import start_worker

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory, random_checkpoint):
    """Run the shipped checkpoint on two devices with one slot each; yields the folder with its trace."""
    folder = tmp_path_factory.mktemp("control")
    settings = {
        "SDTPU_QUEUE": "control",
        "SDTPU_CPU_DEVICES": "2",
        "SDTPU_PROGRESS_S": "0.1",
        "SDTPU_PREVIEW_EVERY": "5",
        "SDTPU_TRACE": str(folder / "trace.json"),
    }
    with start_worker(redis_url, folder, "-Q", "control", **settings):
        yield folder


def order(steps: int, seed: int = 1, **options):
    kwargs = {"seed": seed, "num_inference_steps": steps, "sampler": "ddim"}
    return generate.apply_async(("a red circle on a blue background",), kwargs, queue="control", **options)


def wait_for(job, condition, timeout_s: float = 60):
    wait_until(lambda: condition(job), lambda: f"{job.state}, {job.info}", timeout_s)


def progress_of(job) -> dict:
    """Read state and progress at once; empty when the job is not in progress."""
    meta = job.backend.get_task_meta(job.id)
    return meta["result"] if meta["status"] == "PROGRESS" else {}


def pixels_of(job) -> np.ndarray:
    return np.asarray(open_image(job.get(timeout=120)))


def is_denoising(job) -> bool:
    return progress_of(job).get("pending") is False


def test_progress_grows_to_the_end_and_has_the_shape_that_celery_progress_reads(app, worker):
    job = order(1000)
    seen = []
    while not job.ready():
        info = progress_of(job)
        if info and info not in seen[-1:]:
            seen.append(info)
        time.sleep(0.01)
    assert len(seen) > 3
    assert set(seen[-1]) >= {"current", "total", "percent", "pending", "description", "eta_s"}
    assert [info["current"] for info in seen] == sorted(info["current"] for info in seen)
    assert {info["total"] for info in seen} == {1000}
    assert all(info["percent"] == info["current"] // 10 for info in seen)
    assert seen[-1]["description"] == "denoising"
    etas = [info["eta_s"] for info in seen if info["eta_s"] is not None]
    assert len(etas) > 3
    assert etas[-1] < etas[0]


def test_previews_are_small_pictures(app, worker):
    import base64
    import io

    from PIL import Image

    job = order(1000)
    shown = wait_until(lambda: progress_of(job).get("preview"), "a preview")
    preview = shown.removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(preview))).size == (8, 8), "as large as the latents"
    job.revoke(terminate=True)


def test_a_job_that_waits_says_so_with_its_eta(app, worker):
    running = [order(1000, seed=i) for i in range(2)]
    for job in running:  # jobs that are sent at once may come to their slots in any order
        wait_for(job, is_denoising)
    last = [order(2, seed=i) for i in range(2)][-1]

    def waits() -> dict:
        info = progress_of(last)
        return info if info.get("pending") and info.get("eta_s") else {}

    info = wait_until(waits, "an estimate")
    assert (info["description"], info["current"]) == ("waiting for a slot", 0)
    for job in running:
        job.revoke(terminate=True)
    last.get(timeout=60)


def test_revoke_terminate_frees_the_slot_of_a_running_job_and_leaves_its_neighbours_pixels(app, worker):
    def steps() -> int:
        (stats,) = app.control.inspect(timeout=30, limit=1).stats().values()
        return stats["pool"]["sdtpu"]["loop"]["job_steps"]

    before = steps()
    neighbour, doomed = order(150, seed=5), order(1000, seed=6)
    waiting = [order(2, seed=i) for i in range(3)]
    wait_for(doomed, is_denoising)
    doomed.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        doomed.get(timeout=60)
    for job in waiting:
        job.get(timeout=60)
    pixels = pixels_of(neighbour)
    assert steps() - before < 1000, "its slot was free long before its thousand steps"
    np.testing.assert_array_equal(pixels, pixels_of(order(150, seed=5)), "as without anybody beside it")
    time.sleep(0.5)
    assert doomed.state == "REVOKED", "nothing is stored afterwards"


def test_plain_revoke_and_expires_hold_until_a_job_has_its_slot(app, worker):
    running = [order(1000, seed=i) for i in range(2)]
    wait_for(running[1], is_denoising)
    revoked = order(2)
    kwargs = {"num_inference_steps": 2}
    expired = app.send_task("sdtpu.generate", ["a"], kwargs, queue="control", priority=6, expires=0.4)
    wait_for(revoked, lambda job: job.state in ("STARTED", "PROGRESS"))
    revoked.revoke()
    for job in (revoked, expired):
        with pytest.raises(TaskRevokedError):
            job.get(timeout=60)
    assert not any(job.ready() for job in running), "they were not waited for"
    running[0].revoke()
    for job in running:
        assert job.get(timeout=60)["num_inference_steps"] == 1000


def test_time_limits_end_a_running_job_with_celerys_own_exceptions(app, worker):
    soft, hard = order(1000, soft_time_limit=0.3), order(1000, time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=60)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=60)
    assert order(2).get(timeout=60)["num_inference_steps"] == 2


def test_an_urgent_job_takes_a_slot_even_from_behind_the_prefetch_limit(app, worker):
    # long enough that no slot is free while the urgent job comes from the queue
    low = [order(700, seed=i, priority=9) for i in range(8)]

    def held() -> int:
        return sum(job.state in ("STARTED", "PROGRESS") for job in low)

    wait_until(lambda: held() >= 4 and any(map(is_denoising, low)), lambda: f"hands to be full: {held()}")
    urgent = order(4, seed=99, priority=0)
    urgent.get(timeout=60)
    assert not all(job.ready() for job in low)
    results = [job.get(timeout=120) for job in low]
    # whose slot was taken had it longest
    for result in sorted(results, key=lambda result: result["timings"]["device_s"])[-2:]:
        own = pixels_of(order(700, seed=result["seed"]))
        np.testing.assert_array_equal(np.asarray(open_image(result)), own, "as without preemption")

    def stats() -> dict:
        return next(iter(app.control.inspect(timeout=30, limit=1).stats().values()))

    facts = stats()["pool"]["sdtpu"]
    assert facts["loop"]["preemptions"] >= 1
    assert facts["traces_since_ready"] == 0
    wait_until(lambda: stats()["prefetch_count"] == 4, "the credit to be taken back")


def test_the_trace_opens_as_json_and_shows_devices_and_host(app, worker):
    order(10).get(timeout=60)
    wanted = {"insert", "advance", "decode", "prepare", "transfer", "encode", "store", "occupancy"}

    def names() -> set[str]:
        lines = (worker / "trace.json").read_text().splitlines()[1:-1]
        return {json.loads(line.rstrip(","))["name"] for line in lines if line.endswith("},")}

    wait_until(lambda: names() >= wanted, lambda: f"all to be traced, not {names()} alone")
