"""The page when something is not there: a key, a worker, the door, the network."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from redis import Redis

from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env
from tests.http.doors import keys, start_door
from tests.page.browser import WAIT_MS
from tests.support.paths import ROOT

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

FOX, RUNNING, DONE = "a fox in the snow", re.compile(r"\d+ %"), re.compile("drawn in ")


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Run a private Redis for this file: its workers come and go."""
    with private_redis() as url:
        yield url


@contextlib.contextmanager
def counting_worker(redis_url: str, folder: Path, step_ms: int = 20) -> Iterator[None]:
    """Run a worker whose engine only counts, so that a job takes the time that a test wants."""
    settings = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_FAKE_STEP_MS": str(step_ms),
                "SDTPU_PREVIEW_EVERY": "2", "SDTPU_PROGRESS_S": "0.05", "SDTPU_TICK_S": "0.02",
                "SDTPU_GRACE_S": "0"}  # fmt: skip
    log = folder / "worker.log"
    command = worker_command("tests.http.preview_worker", "-n", "worker@page")
    with running(command, log, env=worker_env(redis_url, **settings), cwd=ROOT) as process:
        wait_for_line(process, log, " ready.", 120)
        yield


def wait_for(card, text):
    expect(card.locator(".state")).to_have_text(text, timeout=WAIT_MS)


def test_a_job_waits_for_a_worker_and_outlives_it(redis_url, visit, tmp_path):
    with start_door(redis_url, tmp_path) as door:
        visitor = visit(door.url)
        visitor.wait_until_live()
        expect(visitor.page.locator("#occupancy")).to_have_text("No worker is running. Pictures wait until one starts.")
        card = visitor.make(FOX, num_inference_steps="600")
        wait_for(card, "waiting for a worker to start")
        visitor.check(state="no-worker")
        with counting_worker(redis_url, tmp_path):
            wait_for(card, RUNNING)
        wait_for(card, "waiting for a worker to start")
        expect(visitor.page.locator("#occupancy")).to_contain_text("No worker is running")
        with counting_worker(redis_url, tmp_path, step_ms=5):
            wait_for(card, DONE)
        visitor.check(state="worker-came-back")


def test_the_page_goes_on_where_it_was_when_the_door_comes_back(redis_url, visit, tmp_path, address):
    with counting_worker(redis_url, tmp_path, step_ms=60):  # its job lasts while the door is started again
        with start_door(redis_url, tmp_path, address=address) as door:
            visitor = visit(door.url)
            visitor.wait_until_live()
            card = visitor.make(FOX, num_inference_steps="1000")
            wait_for(card, RUNNING)
        expect(visitor.page.locator("#connection")).to_have_text("connection lost, trying again", timeout=WAIT_MS)
        late = visitor.make("a late fox", num_inference_steps="2")
        wait_for(late, "waiting for the connection")
        visitor.check(state="connection-lost", allows_network_errors=True)
        (tmp_path / "door.log").unlink()
        with start_door(redis_url, tmp_path, address=address):
            visitor.wait_until_live()
            wait_for(card, RUNNING)
            resumed = [each for each in visitor.requests if "/events?" in each.url][-1]
            assert re.fullmatch("[0-9a-f]{16}", resumed.headers["last-event-id"])
            wait_for(late, DONE)
            expect(visitor.card("a late fox")).to_have_count(1)
            visitor.page.reload()
            expect(visitor.card("a late fox")).to_have_count(1)
            wait_for(visitor.card(FOX).first, RUNNING)
            visitor.card(FOX).first.get_by_text("Cancel").click()
            wait_for(visitor.card(FOX).first, "Cancelled")


def test_callers_with_keys_see_nothing_of_each_other(redis_url, visit, tmp_path):
    known = keys(ann="", bob="")
    with (
        counting_worker(redis_url, tmp_path, step_ms=60),
        start_door(redis_url, tmp_path, SDTPU_HTTP_KEYS=known) as door,
    ):
        ann, bob = visit(door.url), visit(door.url)
        ann.page.fill("#key", "sk-nobody")
        ann.check(state="asks-for-a-key", allows_network_errors=True)
        ann.page.get_by_text("Go on").click()
        expect(ann.page.locator("#key-error")).to_have_text("the key is unknown")
        for visitor, key in ((ann, "sk-ann"), (bob, "sk-bob")):
            visitor.page.fill("#key", key)
            visitor.page.keyboard.press("Enter")
            visitor.wait_until_live()
        card = ann.make("ann's own fox", num_inference_steps="1000")
        wait_for(card, RUNNING)
        expect(ann.page.locator(".slot[data-kind=own]")).to_have_count(1, timeout=WAIT_MS)
        expect(bob.page.locator(".slot[data-kind=busy]")).to_have_count(1, timeout=WAIT_MS)
        expect(bob.page.locator("#occupancy")).to_contain_text("1 of 4 slots busy")
        expect(bob.page.locator(".card, .slot[data-kind=own]")).to_have_count(0)
        job_id = card.get_attribute("id").removeprefix("job-")
        assert job_id not in bob.page.content()
        stolen = bob.page.evaluate(
            """async id => {
                const headers = {Authorization: "Bearer sk-bob"}
                const ask = path => fetch(`/v1/jobs${path}`, {headers}).then(answer => answer.text())
                return (await Promise.all([ask(`/batch?ids=${id}`), ask(""), ask("/capabilities")])).join()
            }""",
            job_id,
        )
        assert job_id not in stolen
        assert "ann" not in stolen
        for visitor in (ann, bob):
            assert not [each.url for each in visitor.requests if "sk-" in each.url]
        ann.check(state="with-a-key", allows_network_errors=True)
        ann.page.reload()
        wait_for(card, RUNNING)
        card.get_by_text("Cancel").click()
        wait_for(card, "Cancelled")
        ann.page.get_by_text("Forget key").click()
        expect(ann.page.locator("#key-dialog")).to_be_visible()
        assert ann.page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_jobs_that_fail_or_expire_say_so_and_one_that_was_refused_goes_with_the_next_try(redis_url, visit, tmp_path):
    with counting_worker(redis_url, tmp_path), start_door(redis_url, tmp_path) as door:
        visitor = visit(door.url)
        visitor.wait_until_live()
        card = visitor.make("nan", num_inference_steps="4")
        wait_for(card, re.compile("Failed: the model gave NaN"))
        visitor.check(state="failed")
        gone = visitor.make("a fox that is gone", num_inference_steps="2")
        wait_for(gone, DONE)
        with Redis.from_url(redis_url) as redis:
            redis.delete(f"sdtpu:image:{gone.get_attribute('id').removeprefix('job-')}")
        other = visit(door.url)  # whose browser has not kept the picture
        wait_for(other.card("a fox that is gone"), "Expired: the server keeps pictures for a while only")
        other.check(state="expired", allows_network_errors=True)
        refused = visitor.make("a" * 19_000 + "!", num_inference_steps="4")
        expect(visitor.page.locator("#prompt-error")).to_contain_text("prompt must have at most 10,000 characters")
        wait_for(refused, re.compile("Failed: prompt must have"))
        visitor.make("a fox", num_inference_steps="2")
        expect(refused).to_have_count(0)


def test_the_page_can_be_switched_off(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_HTTP_PAGE="off") as door, door.client() as client:
        assert [client.get(path).status_code for path in ("/", "/v1/jobs/page/", "/v1/jobs/page")] == [404, 404, 404]
        assert client.get("/v1/jobs").status_code == 200
