"""`/metrics` of real worker processes while their jobs succeed, fail, expire, are revoked, refused and handed over."""

from __future__ import annotations

import http.client
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from sdtpu_worker import generate
from sdtpu_worker.operations.metric_table import METRICS, OUTCOMES, Kind, Source
from sdtpu_worker.testing.processes import private_redis
from tests.chaos.fleet import Fleet, Ledger, WorkerProcess
from tests.observe.scraping import Page, address_of, get, scrape
from tests.support.clients import client_app
from tests.support.waiting import wait_until

ANY_PORT = {"SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_LEASE_S": "3"}
OF_ANOTHER_TIME = {"sdtpu_oldest_request_seconds"}  # no job waits in Redis while nothing is in the way

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def fleet(redis_url, tmp_path) -> Iterator[Fleet]:
    """Give workers of two devices that take 5 ms for a step."""
    redis.Redis.from_url(redis_url).flushdb()
    with Fleet(redis_url, tmp_path, SDTPU_CPU_DEVICES="2", SDTPU_FAKE_STEP_MS="5", **ANY_PORT) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[tuple[str, WorkerProcess]]:
    """Give a worker for tests that count what they add; its Redis is of its own."""
    with private_redis() as url:
        folder = tmp_path_factory.mktemp("shared")
        with Fleet(url, folder, SDTPU_CPU_DEVICES="1", SDTPU_FAKE_STEP_MS="20", **ANY_PORT) as fleet:
            yield url, fleet.start("shared")


@pytest.fixture
def worker(shared) -> Iterator[WorkerProcess]:
    """Give the shared worker, and make its app the current one."""
    url, worker = shared
    with client_app(url):
        yield worker


def counts_of(page: Page) -> dict[tuple[str, str], float]:
    """Return how many jobs ended, by outcome and reason."""
    return {(outcome, reason): n for (outcome, reason), n in page.by_label("sdtpu_requests_total").items() if n}


def ends_of(page: Page) -> float:
    """Return how many jobs have left the worker."""
    return sum(n for (outcome, _), n in counts_of(page).items() if OUTCOMES[outcome].kind == "end")


def added(worker: WorkerProcess, act: Callable[[], object], jobs: int = 1) -> dict[tuple[str, str], float]:
    """Return what is counted of the jobs that an act brings, when they have left the worker."""
    before = scrape(worker)
    act()
    wait_until(lambda: ends_of(scrape(worker)) >= ends_of(before) + jobs, lambda: counts_of(scrape(worker)))
    now, then = counts_of(scrape(worker)), counts_of(before)
    return {key: n - then.get(key, 0) for key, n in now.items() if n != then.get(key, 0)}


def occupy(seconds: float) -> str:
    """Have a job of this length take the only slot of the shared worker; return its id."""
    job = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": round(seconds / 0.02)})
    wait_until(lambda: job.backend.get_task_meta(job.id, cache=False)["status"] == "STARTED")
    time.sleep(0.1)
    return job.id


def test_every_documented_figure_is_exported_and_every_exported_one_is_documented(fleet, app):
    worker, ledger = fleet.start("a"), Ledger()
    for seed in range(4):
        ledger.add(seed, 10)
    ledger.wait(60)
    wait_until(lambda: ends_of(scrape(worker)) == 4)
    wait_until(lambda: scrape(worker).by_label("sdtpu_requests_waiting"), "the worker to look at its queues")
    page = scrape(worker)
    wanted = {m.name: m for m in METRICS.values() if m.source is not Source.QUEUES}
    exported = {f.name + "_total" * (f.type == "counter"): f for f in page.families.values()}
    assert {name for name in exported if not name.startswith(("process_", "python_"))} == set(wanted)
    for name, metric in wanted.items():
        assert exported[name].type == metric.kind.value, name
        assert exported[name].samples or name in OF_ANOTHER_TIME, name
        for sample in exported[name].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample


def test_the_figures_of_jobs_that_succeed_are_true(fleet, app):
    worker, ledger = fleet.start("a"), Ledger()
    for seed in range(10):
        ledger.add(seed, 20)
    ledger.wait(60)
    wait_until(lambda: ends_of(scrape(worker)) == 10)
    page = scrape(worker)
    assert counts_of(page) == {("succeeded", ""): 10}
    assert page.value("sdtpu_images_total") == 10
    assert page.value("sdtpu_steps_total") == 200
    assert page.value("sdtpu_slots") == page.value("sdtpu_devices", state="working") == 2
    for idle in ("sdtpu_requests_running", "sdtpu_requests_pending", "sdtpu_slots_busy", "sdtpu_deliveries_held"):
        assert page.value(idle) == 0
    for each in ("request_queue_time", "request_inference_time", "e2e_request_latency", "prepare", "encode", "store"):
        assert page.value(f"sdtpu_{each}_seconds_count") == 10, each
    queued, device, total = (
        page.value(f"sdtpu_{each}_seconds_sum")
        for each in ("request_queue_time", "request_inference_time", "e2e_request_latency")
    )
    assert 10 * 20 * 0.005 <= device < total
    assert queued + device <= total
    timings = [result["timings"] for result in ledger.results.values()]
    assert total == pytest.approx(sum(each["total_s"] for each in timings), abs=0.05)
    assert queued == pytest.approx(sum(each["queued_s"] for each in timings), abs=0.05)


def test_a_batch_at_work_shows_in_slots_and_queues(fleet, app):
    worker = fleet.start("a", SDTPU_FAKE_STEP_MS="50", SDTPU_LEASE_S="60")
    for seed in range(8):
        generate.apply_async(("x",), {"seed": seed, "num_inference_steps": 1000}, priority=3)
    wait_until(lambda: scrape(worker).value("sdtpu_requests_waiting", queue="sdtpu", priority="3") == 4, "four to wait")
    page = scrape(worker)
    assert page.value("sdtpu_oldest_request_seconds", queue="sdtpu") > 0
    assert page.value("sdtpu_slots_busy") == page.value("sdtpu_requests_running") == 2
    assert page.value("sdtpu_requests_pending") == 2  # two batches are held, the rest waits in Redis
    assert page.value("sdtpu_deliveries_held") == 4
    assert page.value("sdtpu_requests_waiting", queue="sdtpu", priority="3") == 4
    assert page.value("sdtpu_requests_waiting", queue="sdtpu.t0", priority="3") == 0
    ticks, occupancy = "sdtpu_tick_occupancy_ratio_count", "sdtpu_tick_occupancy_ratio_sum"
    later = wait_until(lambda: found if (found := scrape(worker)).value(ticks) > page.value(ticks) else None)
    assert later.value(occupancy) - page.value(occupancy) == later.value(ticks) - page.value(ticks), "all are full"
    assert page.value("sdtpu_padding_steps_total") == 0
    assert page.value("sdtpu_device_memory_bytes", device="1", kind="used") == 1
    assert 0 <= page.value("sdtpu_lease_age_seconds") < page.value("sdtpu_lease_seconds") == 60


def test_an_image_that_the_devices_cannot_make_is_counted_by_its_error(worker):
    failed = added(worker, lambda: generate.apply_async(("raise",), {"seed": 1, "num_inference_steps": 5}))
    assert failed == {("failed", "GenerationFailed"): 1}
    assert scrape(worker).value("sdtpu_device_failures_total") >= 1
    assert scrape(worker).value("sdtpu_retries_total") >= 1


def test_a_job_over_its_time_limits_is_counted_by_the_limit(worker):
    def over(**limit: float) -> dict[tuple[str, str], float]:
        kwargs = {"seed": 1, "num_inference_steps": 1000}
        return added(worker, lambda: generate.apply_async(("x",), kwargs, **limit))

    assert over(soft_time_limit=0.2) == {("failed", "SoftTimeLimitExceeded"): 1}
    assert over(time_limit=0.2) == {("failed", "TimeLimitExceeded"): 1}


def test_a_wrong_parameter_and_a_message_that_is_none_are_refused(worker, shared):
    app = generate.app
    assert added(worker, lambda: app.send_task("sdtpu.generate", ("x",), {"steps": 5}, queue="sdtpu")) == {
        ("refused", "InvalidRequest"): 1
    }
    with redis.Redis.from_url(shared[0]) as client:
        assert added(worker, lambda: client.lpush("sdtpu", "no JSON")) == {("refused", "InvalidMessage"): 1}


def test_a_job_that_is_revoked_is_counted_where_it_was(worker):
    running = occupy(20)
    waiting = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 5})
    wait_until(lambda: scrape(worker).value("sdtpu_requests_pending") == 1)

    def revoke(task_id: str, terminate: bool) -> None:
        generate.app.control.revoke(task_id, terminate=terminate)

    assert added(worker, lambda: revoke(waiting.id, False)) == {("revoked", "waiting"): 1}
    assert added(worker, lambda: revoke(running, True)) == {("revoked", "terminated"): 1}
    assert scrape(worker).value("sdtpu_requests_running") == 0


def test_a_job_that_had_no_slot_in_time_is_expired(worker):
    def enqueue() -> None:
        occupy(6)
        kwargs = {"seed": 1, "num_inference_steps": 5}  # by its name, the task is not refused where it is sent
        generate.app.send_task("sdtpu.generate", ("x",), kwargs, queue="sdtpu", expires=0.6)

    assert added(worker, enqueue, jobs=2) == {("expired", ""): 1, ("succeeded", ""): 1}


def test_an_urgent_job_preempts_and_the_other_one_resumes(worker):
    def enqueue() -> None:
        occupy(6)
        generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 5}, priority=0)

    assert added(worker, enqueue, jobs=2) == {("succeeded", ""): 2, ("preempted", ""): 1, ("resumed", ""): 1}


def test_a_job_that_celery_sends_again_is_counted_as_retried(redis_url, tmp_path, app):
    with Fleet(redis_url, tmp_path, app="tests.observe.retrying_worker", **ANY_PORT) as fleet:
        redis.Redis.from_url(redis_url).flushdb()
        worker = fleet.start("a")
        generate.apply_async(("raise",), {"seed": 1, "num_inference_steps": 5})
        wait_until(lambda: ends_of(scrape(worker)) == 2, lambda: counts_of(scrape(worker)))
        assert counts_of(scrape(worker)) == {("retried", "GenerationFailed"): 1, ("failed", "GenerationFailed"): 1}


def test_jobs_of_a_worker_that_stops_are_handed_over_and_resumed(fleet, app):
    first, ledger = fleet.start("a", SDTPU_GRACE_S="5", SDTPU_FAKE_STEP_MS="20"), Ledger()
    for seed in range(2):
        ledger.add(seed, 1000)
    wait_until(lambda: scrape(first).value("sdtpu_steps_total") > 20)
    seen: list[Page] = []
    first.send(signal.SIGTERM)
    while first.is_running:
        try:
            seen.append(scrape(first))
        except (OSError, http.client.HTTPException):
            break
        time.sleep(0.02)
    assert seen[0].value("sdtpu_worker_live") == 1
    assert seen[-1].value("sdtpu_worker_ready") == 0
    first.process.wait(60)
    assert first.text().count(" handed_over (stopping): waited") == 2
    second = fleet.start("b")
    ledger.wait(60)
    assert not ledger.wrong_pictures()
    wait_until(lambda: ends_of(scrape(second)) == 2)
    assert counts_of(scrape(second)) == {
        ("succeeded", ""): 2, ("redelivered", "handed_over"): 2, ("resumed", ""): 2,
    }  # fmt: skip


def test_jobs_of_a_worker_that_was_killed_are_counted_as_redelivered(fleet, app):
    first, ledger = fleet.start("a", SDTPU_FAKE_STEP_MS="100"), Ledger()  # the job lasts while another worker starts
    for seed in range(3):
        ledger.add(seed, 800)
    wait_until(lambda: scrape(first).value("sdtpu_steps_total") > 20)
    wait_until(lambda: scrape(first).value("sdtpu_requests_pending") == 1)
    second = fleet.start("b")
    first.kill()
    ledger.wait(90)
    wait_until(lambda: ends_of(scrape(second)) == 3)
    page = scrape(second)
    assert counts_of(page) == {
        ("succeeded", ""): 3, ("redelivered", "died"): 2, ("redelivered", "requeued"): 1,
    }, "one had no slot there"  # fmt: skip
    assert page.value("sdtpu_deliveries_redelivered_total") == 3


def test_openmetrics_is_served_to_who_asks_for_it(worker):
    url = f"{address_of(worker.log)}/metrics"
    content_type, text = get(url, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert get(url)[0].startswith("text/plain")


def test_no_label_has_a_value_that_a_client_chose(worker):
    added(worker, lambda: generate.apply_async(("a secret prompt",), {"tenant": "acme", "num_inference_steps": 5}))
    _, text = get(f"{address_of(worker.log)}/metrics")
    assert "secret" not in text
    assert "acme" not in text
    assert {metric.kind for metric in METRICS.values() if metric.name.endswith("_total")} == {Kind.COUNTER}
