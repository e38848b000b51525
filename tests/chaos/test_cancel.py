"""Cancelling and limits, on a real worker: the job ends as Celery says, its neighbours and Redis do not notice.

    pytest tests/chaos/test_cancel.py -n 0

Two cores, a worker on the fake engine with two slots, steps of 10 ms. Every test ends with nothing left in Redis and
nothing held by the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from celery.states import READY_STATES

from sdtpu_worker import generate
from sdtpu_worker.images.store import read_image_bytes
from tests.chaos.fleet import Fleet
from tests.chaos.footprint import assert_nothing_left
from tests.chaos.pictures import expected_count, shown_count
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "1",
    "SDTPU_FAKE_STEP_MS": "10",
    "SDTPU_PROGRESS_S": "0.05",
}


@pytest.fixture(scope="module")
def fleet(redis_url, tmp_path_factory):
    with Fleet(redis_url, tmp_path_factory.mktemp("cancel"), **SETTINGS) as fleet:
        fleet.start("cancel")
        yield fleet


@pytest.fixture(autouse=True)
def nothing_is_left(fleet, app):
    yield
    with redis.Redis.from_url(fleet.redis_url) as client:
        assert_nothing_left(app, client)


def order(steps: int, seed: int = 1, **options):
    return generate.apply_async(("x",), {"seed": seed, "num_inference_steps": steps}, **options)


def wait_for(job, condition: Callable, timeout_s: float = 60) -> None:
    wait_until(lambda: condition(job.backend.get_task_meta(job.id, cache=False)), lambda: f"not {job.state}", timeout_s)


def is_denoising(meta) -> bool:
    return meta["status"] == "PROGRESS" and not meta["result"]["pending"]


def is_waiting(meta) -> bool:
    return meta["status"] == "PROGRESS" and meta["result"]["pending"]


def assert_done(job, steps: int, seed: int) -> None:
    """Assert that a neighbour took each of its steps once."""
    assert shown_count(read_image_bytes(job.get(timeout=60))) == expected_count(seed, steps)


def assert_ends(job, error: type[Exception], state: str) -> None:
    """Assert how a job ends, and that nothing is stored afterwards."""
    with pytest.raises(error):
        job.get(timeout=60)
    time.sleep(0.15)
    assert job.backend.get_task_meta(job.id, cache=False)["status"] == state


def test_terminate_takes_a_running_and_a_waiting_job_away_at_once(app):
    doomed, neighbour = order(1000, 1), order(1000, 2)
    wait_for(doomed, is_denoising)
    wait_for(neighbour, is_denoising)
    waiting, next_one = order(1000, 3), order(10, 4)
    wait_for(waiting, is_waiting)
    waiting.revoke(terminate=True)
    assert_ends(waiting, TaskRevokedError, "REVOKED")
    doomed.revoke(terminate=True)
    assert_ends(doomed, TaskRevokedError, "REVOKED")
    assert_done(next_one, 10, 4)
    assert not neighbour.ready(), "both ended, and the slot was free, long before the neighbour was done"
    assert_done(neighbour, 1000, 2)


def test_a_plain_revoke_and_expires_hold_until_the_slot_and_no_longer(app):
    running = [order(1000, seed) for seed in (1, 2)]
    for job in running:
        wait_for(job, is_denoising)
    revoked = order(5, 3)
    options = {"expires": 0.3, "priority": 6, "queue": "sdtpu"}  # our own client would refuse such a deadline
    expired = app.send_task("sdtpu.generate", ("x",), {"seed": 4, "num_inference_steps": 5}, **options)
    wait_for(revoked, is_waiting)
    revoked.revoke()
    running[0].revoke()
    assert_ends(revoked, TaskRevokedError, "REVOKED")
    assert_ends(expired, TaskRevokedError, "REVOKED")
    for seed, job in enumerate(running, 1):
        assert_done(job, 1000, seed)


def test_jobs_are_revoked_by_their_stamp_while_they_wait(app):
    running = [order(1000, seed) for seed in (1, 2)]
    for job in running:
        wait_for(job, is_denoising)
    theirs, others = [order(5, seed, stamped_headers=["customer"], customer=name)
                      for seed, name in ((3, "gone"), (4, "here"))]  # fmt: skip
    wait_for(others, is_waiting)
    app.control.revoke_by_stamped_headers({"customer": ["gone"]})
    assert_ends(theirs, TaskRevokedError, "REVOKED")
    assert_done(others, 5, 4)
    for seed, job in enumerate(running, 1):
        assert_done(job, 1000, seed)


def test_time_limits_end_a_running_job_with_celerys_own_exceptions_and_count_from_the_slot(app):
    neighbour = order(500, 1)
    wait_for(neighbour, is_denoising)
    soft, hard = order(1000, 2, soft_time_limit=0.3), order(1000, 3, time_limit=0.3)
    patient = order(5, 4, time_limit=0.2)  # it waits for longer than that
    assert_ends(soft, SoftTimeLimitExceeded, "FAILURE")
    assert_ends(hard, TimeLimitExceeded, "FAILURE")
    assert_done(patient, 5, 4)
    assert_done(neighbour, 500, 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [(("--soft-time-limit", "1"), SoftTimeLimitExceeded), (("--time-limit", "1"), TimeLimitExceeded)],
)
def test_a_workers_own_limits_hold_for_jobs_without_any(fleet, app, options, error):
    worker = fleet.start("limited", *options, "-Q", "limited", SDTPU_QUEUE="limited")
    try:
        slow, quick = (
            generate.apply_async(("x",), {"seed": 7, "num_inference_steps": steps}, queue="limited")
            for steps in (1000, 20)
        )
        assert_ends(slow, error, "FAILURE")
        assert_done(quick, 20, 7)
    finally:
        assert worker.stop() == 0


def test_a_job_that_was_revoked_before_its_worker_started_is_not_run(app, fleet, tmp_path):
    with Fleet(fleet.redis_url, tmp_path, **SETTINGS) as late:
        app.control.cancel_consumer("sdtpu", reply=True, timeout=60, destination=["cancel@chaos"])
        try:
            for name in ("late", "later", "latest"):  # Celery waits a second for what others know: not always enough
                job = order(1)
                job.revoke()
                wait_until(lambda job=job: job.id in str(app.control.inspect(["cancel@chaos"]).revoked()), "the revoke")
                worker = late.start(name)
                wait_for(job, lambda meta: meta["status"] in READY_STATES)
                worker.stop()
                if has_asked := "mingle: sync with 1 nodes" in worker.text():
                    break
            assert has_asked
            assert job.state == "REVOKED"
            with redis.Redis.from_url(fleet.redis_url) as client:
                assert not client.exists("sdtpu:dead")
        finally:
            app.control.add_consumer("sdtpu", reply=True, timeout=60, destination=["cancel@chaos"])


def test_another_task_that_was_sent_to_a_device_queue_runs_as_in_celerys_own_thread_pool(fleet, app):
    found = app.send_task("celery.accumulate", [1, 2], queue="sdtpu").get(timeout=60)
    assert found == [1, 2]
