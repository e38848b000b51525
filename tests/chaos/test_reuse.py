"""Exact reuse between real workers: an equal job is answered from the store, or waits, and never waits for nothing.

    pytest tests/chaos/test_reuse.py -n 0

Two cores, two workers on the fake engine with two slots each, and one with a queue of its own; steps of 10 ms, so that
a job of 1000 steps lasts while a busy machine sends others. A job's picture shows its seed and steps.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError

from sdtpu_worker import generate
from sdtpu_worker.images.store import read_image_bytes
from sdtpu_worker.reuse.ledger import LEAD_S
from sdtpu_worker.reuse.notes import Lead, token_of
from tests.chaos.fleet import Fleet
from tests.chaos.pictures import expected_count, shown_count
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {
    "SDTPU_REUSE": "on",
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_FAKE_STEP_MS": "10",
    "SDTPU_PROGRESS_S": "0.05",
    "SDTPU_LEASE_S": "20",
}
SEEDS = iter(range(1000, 10_000))


@pytest.fixture(scope="module")
def fleet(redis_url, tmp_path_factory) -> Iterator[Fleet]:
    with Fleet(redis_url, tmp_path_factory.mktemp("reuse"), **SETTINGS) as fleet:
        fleet.start("one")
        fleet.start("two")
        fleet.start("alone", "-Q", "alone", SDTPU_QUEUE="alone")
        yield fleet


@pytest.fixture(autouse=True)
def client(fleet) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(fleet.redis_url) as client:
        yield client


@pytest.fixture
def seed() -> int:
    """Give a seed that no other test uses: jobs of other tests are no equal ones."""
    return next(SEEDS)


def order(seed: int, steps: int = 20, **options: Any) -> Any:
    kwargs = {"seed": seed, "num_inference_steps": steps}
    kwargs |= {name: options.pop(name) for name in ("tenant", "image_format") if name in options}
    return generate.apply_async((options.pop("prompt", "x"),), kwargs, **options)


def leads(client: redis.Redis) -> dict[bytes, bytes]:
    """Return the leads that there are."""
    found: dict[bytes, Any] = {key: client.get(key) for key in client.scan_iter("sdtpu:reuse:*:lead")}
    return {key: lead for key, lead in found.items() if lead is not None}


def steps_done(app: Any) -> int:
    """Return how many denoising steps jobs took on all workers."""
    stats = app.control.inspect(timeout=20, limit=3).stats() or {}
    assert len(stats) == 3, "a worker does not answer"
    return sum(each["pool"]["sdtpu"]["loop"]["job_steps"] for each in stats.values())


def state_of(job: Any) -> dict[str, Any]:
    return job.backend.get_task_meta(job.id, cache=False)


def is_denoising(job: Any) -> bool:
    meta = state_of(job)
    return meta["status"] == "PROGRESS" and meta["result"]["description"] == "denoising"


def follows(job: Any) -> bool:
    meta = state_of(job)
    return meta["status"] == "PROGRESS" and "an equal job" in meta["result"]["description"]


def wait_for(condition: Callable[[Any], bool], *jobs: Any) -> None:
    wait_until(lambda: all(map(condition, jobs)), lambda: f"{[state_of(job) for job in jobs]}")


def assert_shows(result: dict[str, Any], seed: int, steps: int) -> None:
    assert shown_count(read_image_bytes(result)) == expected_count(seed, steps)


def test_an_equal_job_gets_the_stored_picture_and_no_device_is_asked(app, seed):
    first = order(seed).get(timeout=60)
    before = steps_done(app)
    second = order(seed).get(timeout=60)
    assert steps_done(app) == before
    assert [first["reused"], second["reused"]] == [False, True]
    assert read_image_bytes(second) == read_image_bytes(first)
    assert second["image"]["uri"] != first["image"]["uri"], "each result has an image of its own"
    assert second["batch"] == first["batch"]
    assert second["timings"]["device_s"] == 0.0
    same = ("prompt", "seed", "num_inference_steps", "sampler", "model", "options")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert not order(seed + 5000).get(timeout=60)["reused"]


def test_equal_jobs_in_flight_run_once_on_all_workers_and_show_the_leaders_progress(app, seed):
    before = steps_done(app)
    leader = order(seed, 1000)
    wait_for(is_denoising, leader)
    others = [order(seed, 1000) for _ in range(12)]  # more than what one worker holds
    wait_for(lambda job: follows(job) and state_of(job)["result"].get("total") == 1000, *others)
    results = [job.get(timeout=60) for job in (leader, *others)]
    assert Counter(result["reused"] for result in results) == {False: 1, True: 12}
    assert steps_done(app) - before == 1000
    for result in results:
        assert_shows(result, seed, 1000)


def test_waiting_jobs_take_no_place_from_others(app, seed):
    leader = order(seed, 1000, queue="alone")
    wait_for(is_denoising, leader)
    others = [order(seed, 1000, queue="alone") for _ in range(10)]  # the worker holds four jobs
    wait_for(follows, *others)
    assert_shows(order(seed + 5000, 5, queue="alone").get(timeout=60), seed + 5000, 5)
    assert not leader.ready()
    assert [job.get(timeout=60)["reused"] for job in others] == [True] * 10


def test_when_the_leader_is_revoked_one_of_the_waiting_jobs_draws(app, seed):
    leader = order(seed, 500)
    wait_for(is_denoising, leader)
    others = [order(seed, 500) for _ in range(3)]
    wait_for(follows, *others)
    leader.revoke(terminate=True)
    results = [job.get(timeout=60) for job in others]
    assert sorted(result["reused"] for result in results) == [False, True, True]
    for result in results:
        assert_shows(result, seed, 500)
    with pytest.raises(TaskRevokedError):
        leader.get(timeout=60)


def test_when_the_leader_fails_each_equal_job_fails_for_itself_one_after_the_other(app, seed):
    jobs = [order(seed, 20, prompt="raise") for _ in range(3)]
    errors = [job.get(timeout=60, propagate=False) for job in jobs]
    assert [type(error).__name__ for error in errors] == ["GenerationFailed"] * 3


def test_a_waiting_job_is_revoked_at_once_and_the_others_do_not_notice(app, seed):
    leader = order(seed, 700)
    wait_for(is_denoising, leader)
    first, second = order(seed, 700), order(seed, 700)
    wait_for(follows, first, second)
    first.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        first.get(timeout=60)
    assert not leader.ready(), "it was not waited for"
    assert second.get(timeout=60)["reused"]


@pytest.fixture
def busy(app, seed) -> Iterator[list[Any]]:
    """Give both slots of the worker that is alone to long jobs."""
    jobs = [order(seed + 5000 + i, 1000, queue="alone") for i in range(2)]
    wait_for(is_denoising, *jobs)
    yield jobs
    for job in jobs:
        job.revoke(terminate=True)


def test_a_waiting_job_expires_in_time_with_its_leader_while_that_has_no_slot(app, busy, seed):
    # our own client would refuse such a deadline
    options = {"expires": 5, "priority": 6, "queue": "alone", "args": ("x",)}
    kwargs = {"seed": seed, "num_inference_steps": 5}
    jobs = [app.send_task("sdtpu.generate", kwargs=kwargs, **options) for _ in range(2)]
    wait_until(lambda: any(map(follows, jobs)), "one of the two to follow the other")
    for job in jobs:
        with pytest.raises(TaskRevokedError):
            job.get(timeout=60)
    assert not any(job.ready() for job in busy), "they have their slots for ten seconds"


def test_a_job_does_not_expire_while_its_leader_has_a_slot(app, client, seed):
    leader = order(seed, 1000, queue="alone")
    wait_for(is_denoising, leader)
    kwargs = {"seed": seed, "num_inference_steps": 1000}

    def says_that_it_has_a_slot() -> bool:
        told = filter(None, map(Lead.from_bytes, leads(client).values()))
        return any(lead.had_slot for lead in told if lead.token == token_of(leader.id))

    wait_until(says_that_it_has_a_slot, "the lead to say that there is a slot")
    late = app.send_task("sdtpu.generate", ("x",), kwargs, expires=0.5, priority=6, queue="alone")
    assert late.get(timeout=60)["reused"]
    assert leader.get(timeout=60)


def test_a_job_that_would_expire_before_its_leader_has_a_slot_does_not_wait_for_it(app, busy, seed):
    patient = order(seed, 300, queue="alone")
    wait_for(lambda job: state_of(job)["status"] == "PROGRESS", patient)
    hurried = order(seed, 300, expires=60, queue="alone")
    wait_for(lambda job: state_of(job)["status"] == "PROGRESS", hurried)
    assert state_of(hurried)["result"]["description"] == "waiting for a slot", "it goes first, having a deadline"
    busy[0].revoke(terminate=True)
    assert not hurried.get(timeout=60)["reused"]
    assert_shows(patient.get(timeout=60), seed, 300)


def test_a_more_urgent_job_does_not_wait_for_a_less_urgent_one_but_others_wait_for_it(app, busy, seed):
    patient = order(seed, 900, priority=9, queue="alone")
    wait_for(lambda job: state_of(job)["status"] == "PROGRESS", patient)
    urgent = order(seed, 900, priority=0, queue="alone")
    wait_for(is_denoising, urgent)
    another = order(seed, 900, priority=0, queue="alone")
    wait_for(follows, another)
    assert not urgent.get(timeout=60)["reused"]
    assert another.get(timeout=60)["reused"]
    assert_shows(patient.get(timeout=60), seed, 900)


def test_tenants_do_not_get_each_others_pictures(app, seed):
    results = [order(seed, tenant=tenant).get(timeout=60) for tenant in ("a", "b", None, "a", "b", None)]
    assert [result["reused"] for result in results] == [False] * 3 + [True] * 3


def test_a_picture_that_is_gone_or_damaged_is_drawn_again(app, client, seed):
    first = order(seed).get(timeout=60)
    key = first["image"]["uri"].removeprefix("redis:")
    client.delete(key)
    second = order(seed).get(timeout=60)
    assert not second["reused"]
    key = second["image"]["uri"].removeprefix("redis:")
    client.set(key, client.get(key)[:-1] + b"x")
    third = order(seed).get(timeout=60)
    assert not third["reused"]
    assert_shows(third, seed, 20)
    assert order(seed).get(timeout=60)["reused"]


def pointers(client: redis.Redis) -> set[bytes]:
    return {key for key in client.scan_iter("sdtpu:reuse:*") if not key.endswith(b":lead")}


def test_a_forged_pointer_opens_nothing_but_an_image_of_this_very_job(app, client, seed, tmp_path):
    victim = order(seed + 5000).get(timeout=60)
    secret = tmp_path / "secret.png"
    secret.write_bytes(read_image_bytes(victim))
    before = pointers(client)
    order(seed).get(timeout=60)
    (key,) = pointers(client) - before
    true = json.loads(client.get(key))
    of_victim = json.loads(next(value for name in before if victim["task_id"] in (value := client.get(name).decode())))
    forged = [
        [f"../..{secret}", *true[1:]],
        [f"file://{secret}", *of_victim[1:]],
        ["http://127.0.0.1:1/x", *true[1:]],
        of_victim,
        "no pointer",
        {"task_id": "x"},
        [true[0], 2**70, *true[2:]],
        ["x" * 3000, *true[1:]],
    ]
    for value in forged:
        client.set(key, json.dumps(value))
        result = order(seed).get(timeout=60)
        assert not result["reused"], value
        assert_shows(result, seed, 20)
    client.delete(key)
    client.rpush(key, "of another type")
    assert_shows(order(seed).get(timeout=60), seed, 20)


def test_a_forged_lead_makes_nobody_wait(app, client, seed):
    before = pointers(client)
    order(seed).get(timeout=60)
    (key,) = pointers(client) - before
    for forged in (f"{'f' * 32} 0 inf 1 0 1 20 100", "x" * 10_000, "0 0 0"):
        client.delete(key)
        client.set(key + b":lead", forged)  # which does not expire, as a worker's does
        started = time.monotonic()
        assert not order(seed).get(timeout=60)["reused"]
        assert time.monotonic() - started < LEAD_S


def test_nothing_is_left_but_pointers_that_expire(app, client, seed):
    order(seed).get(timeout=60)
    wait_until(lambda: not leads(client), "all leads to be given up")
    lifetimes = [client.ttl(key) for key in pointers(client)]
    assert lifetimes
    assert all(0 < life <= 24 * 3600 for life in lifetimes)


def test_a_killed_leader_is_followed_by_a_waiting_job(redis_url, tmp_path, app, seed):
    with Fleet(redis_url, tmp_path, **{**SETTINGS, "SDTPU_QUEUE": "killed", "SDTPU_LEASE_S": "3"}) as fleet:
        doomed = fleet.start("doomed", "-Q", "killed", SDTPU_FAKE_STEP_MS="60")  # still at it when the heir has started
        leader = order(seed, 1000, queue="killed")
        wait_for(is_denoising, leader)
        fleet.start("heir", "-Q", "killed", SDTPU_FAKE_STEP_MS="2")
        app.control.cancel_consumer("killed", reply=True, timeout=60, destination=["doomed@chaos"])
        others = [order(seed, 1000, queue="killed") for _ in range(3)]
        wait_for(follows, *others)
        doomed.kill()
        results = [job.get(timeout=60) for job in (leader, *others)]
    assert sum(not result["reused"] for result in results) == 1
    for result in results:
        assert_shows(result, seed, 1000)


def test_a_stopping_worker_hands_over_its_leader_and_those_that_wait(redis_url, tmp_path, app, seed):
    with Fleet(redis_url, tmp_path, **SETTINGS, SDTPU_QUEUE="stopped", SDTPU_GRACE_S="0.5") as fleet:
        first = fleet.start("first", "-Q", "stopped")
        jobs = [order(seed, 1000, queue="stopped") for _ in range(4)]
        wait_until(lambda: sum(map(follows, jobs)) == 3, "three to wait")
        time.sleep(0.3)
        assert first.stop() == 0
        time.sleep(LEAD_S)
        second = fleet.start("second", "-Q", "stopped", SDTPU_FAKE_STEP_MS="1")
        results = [job.get(timeout=60) for job in jobs]
        assert sum(not result["reused"] for result in results) == 1
        assert second.stop() == 0
        steps = [worker.loop_stats()["job_steps"] for worker in (first, second)]
        assert sum(steps) == 1000, "the leader continues from its snapshot"
    for result in results:
        assert_shows(result, seed, 1000)


STORM = {"SDTPU_QUEUE": "storm", "SDTPU_MAX_DELIVERIES": "100", "SDTPU_LEASE_S": "2"}


def test_workers_that_are_killed_again_and_again_lose_nothing_and_draw_little_twice(redis_url, tmp_path, app):
    seeds = [next(SEEDS) for _ in range(16)]
    with Fleet(redis_url, tmp_path, **SETTINGS | STORM) as fleet:
        workers = [fleet.start(name, "-Q", "storm", SDTPU_FAKE_STEP_MS="5") for name in ("a", "b")]
        jobs = [(seed, order(seed, 600, queue="storm")) for _ in range(10) for seed in seeds]
        kills = 0
        while kills < 4 and sum(job.ready() for _, job in jobs) < len(jobs):
            time.sleep(1.5)
            workers[kills % 2].kill()
            workers[kills % 2] = fleet.start(f"{kills}", "-Q", "storm", SDTPU_FAKE_STEP_MS="5")
            kills += 1
        results = [(seed, job.get(timeout=90)) for seed, job in jobs]
    for seed, result in results:
        assert_shows(result, seed, 600)
    drawn = Counter(seed for seed, result in results if not result["reused"])
    print(f"\n{len(jobs)} jobs of {len(seeds)} requests, {kills} kills: {drawn.total()} drawn")
    assert kills >= 2
    assert set(drawn) == set(seeds), "each request was drawn"
    assert drawn.total() < 48
