"""`sdtpu metrics`: what lies in Redis for the task, in Prometheus' text format, while no worker runs."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from redis import Redis

from sdtpu_worker import generate
from sdtpu_worker.cli import sdtpu
from sdtpu_worker.contract.load_report import WorkerLoad, publish_load
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.scripts import CLAIM, DEAD_LETTER
from sdtpu_worker.operations.metric_table import METRICS, Source
from sdtpu_worker.testing.processes import free_port, private_redis, running, wait_for_line, worker_env
from sdtpu_worker.worker.queue_watch import QueueWatch
from tests.observe.scraping import Page, get
from tests.support.paths import ROOT

APP = "sdtpu_worker.app"


@pytest.fixture
def redis(redis_url):
    """Give a client of an empty Redis."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def read(redis_url, monkeypatch, app, redis, tmp_path):
    """Give what `sdtpu metrics` prints, for an app of a project."""
    (tmp_path / "project_of_metrics.py").write_text(
        "from celery import Celery\nfrom sdtpu_worker import install\n"
        f"app = install(Celery('project', broker={redis_url!r}, set_as_current=False))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "project_of_metrics", raising=False)

    def read() -> Page:
        done = CliRunner().invoke(sdtpu, ["metrics", "-A", "project_of_metrics"])
        assert done.exit_code == 0, done.output
        return Page(done.output)

    return read


def hold_one(redis: Redis, queue_list: str) -> None:
    """Claim a message as a worker does."""
    redis.eval(CLAIM, 3, Keys().held, Keys().leases, queue_list, f"tag-{time.time()}", 30, 10**6, 100, "t")


def load_of(host: str, slots: int, held: int) -> WorkerLoad:
    return WorkerLoad(host, slots, {"8x8": 0.1}, mean_job_s=5.0, held={6: held}, next_free_s=2.0)


def test_an_empty_broker_says_that_nothing_waits_so_that_hosts_scale_to_zero(read):
    page = read()
    waiting = page.by_label("sdtpu_requests_waiting")
    assert len(waiting) == 17 * 4
    assert sum(waiting.values()) == sum(page.by_label("sdtpu_requests_held").values()) == 0
    assert page.value("sdtpu_workers") == 0
    assert page.by_label("sdtpu_oldest_request_seconds") == page.by_label("sdtpu_queue_wait_estimate_seconds") == {}


def test_jobs_are_counted_in_all_bands_and_shards_also_those_that_workers_hold(read, redis):
    generate.delay("held")
    hold_one(redis, "sdtpu\x06\x166")
    generate.delay("waits")
    generate.apply_async(("waits",), priority=0)
    generate.apply_async(("waits",), {"tenant": "a"}, priority=9)
    page = read()
    assert page.value("sdtpu_requests_waiting", queue="sdtpu", priority="6") == 1
    assert page.value("sdtpu_requests_waiting", queue="sdtpu", priority="0") == 1
    assert page.value("sdtpu_requests_waiting", queue="sdtpu.t10", priority="9") == 1
    assert page.value("sdtpu_requests_held", queue="sdtpu") == 1
    load = sum(page.by_label("sdtpu_requests_waiting").values()) + sum(page.by_label("sdtpu_requests_held").values())
    assert load == 4


def test_the_age_of_the_oldest_counts_from_when_it_was_sent_or_due(read, app, redis):
    now = time.time()
    generate.apply_async(("a",), headers={"sdtpu_sent_at": now - 100})
    generate.apply_async(("b",), headers={"sdtpu_sent_at": now - 200}, priority=9)
    assert read().value("sdtpu_oldest_request_seconds", queue="sdtpu") == pytest.approx(200, abs=50)
    redis.flushdb()
    due = datetime.now(UTC) - timedelta(seconds=300)
    generate.apply_async(("a",), headers={"sdtpu_sent_at": now - 3600}, eta=due)
    assert read().value("sdtpu_oldest_request_seconds", queue="sdtpu") == pytest.approx(300, abs=50)


def test_a_job_of_a_client_that_sends_no_time_has_no_age_whatever_its_prompt_says(read, app):
    prompt = '"sdtpu_sent_at": 1, "eta": "2001-01-01T00:00:00+00:00"'
    app.send_task("sdtpu.generate", (prompt,), {"negative_prompt": prompt}, queue="sdtpu", headers={"x": prompt})
    page = read()
    assert page.value("sdtpu_requests_waiting", queue="sdtpu", priority="6") + page.value(
        "sdtpu_requests_waiting", queue="sdtpu", priority="0") == 1  # fmt: skip
    assert page.by_label("sdtpu_oldest_request_seconds") == {}


@pytest.mark.parametrize("message", ["", "no JSON", '{"headers": {"sdtpu_sent_at": 1e400, "eta": "9999-99-99"}}',
                                     '{"sdtpu_sent_at": 1.2.3}', '{"eta": "0001-01-01"}'])  # fmt: skip
def test_a_message_that_is_none_breaks_nothing(read, redis, message):
    redis.lpush("sdtpu", message)
    assert read().value("sdtpu_requests_waiting", queue="sdtpu", priority="0") == 1


def test_workers_and_the_wait_for_them_are_those_of_their_load_reports(read, redis):
    publish_load(redis, "sdtpu", load_of("a@tpu", 4, 4))
    publish_load(redis, "sdtpu", load_of("b@tpu", 4, 6))
    for _ in range(8):
        generate.delay("a fox")
    page = read()
    assert page.value("sdtpu_workers") == 2
    assert page.by_label("sdtpu_host_slots") == {("a@tpu",): 4, ("b@tpu",): 4}
    assert page.by_label("sdtpu_host_requests_held") == {("a@tpu",): 4, ("b@tpu",): 6}
    assert page.value("sdtpu_host_job_seconds", host="a@tpu") == 5
    assert 2 < page.value("sdtpu_queue_wait_estimate_seconds", queue="sdtpu") < 10
    empty_shard = page.value("sdtpu_queue_wait_estimate_seconds", queue="sdtpu.t3")  # served in turn
    assert 0 < empty_shard < page.value("sdtpu_queue_wait_estimate_seconds", queue="sdtpu")


def test_every_figure_of_queues_is_exported_and_documented(read, redis):
    publish_load(redis, "sdtpu", load_of("a@tpu", 4, 4))
    generate.delay("a fox")
    keys = Keys()
    redis.eval(DEAD_LETTER, 4, keys.held, keys.leases, keys.dead, keys.dead_counts, "tag", "InvalidMessage", "{}", 9)
    page = read()
    wanted = {metric.name: metric for metric in METRICS.values() if metric.source is not Source.WORKER}
    exported = {family.name + "_total" * (family.type == "counter"): family for family in page.families.values()}
    assert set(exported) == set(wanted)
    for name, family in exported.items():
        assert family.samples, name
        assert {frozenset(sample.labels) for sample in family.samples} == {frozenset(wanted[name].labels)}
    assert page.value("sdtpu_dead_letters_total", kind="InvalidMessage") == 1


def test_the_figures_are_served_until_the_command_is_stopped(redis_url, app, redis, tmp_path):
    log = tmp_path / "metrics.log"
    code = "from sdtpu_worker.cli import sdtpu; sdtpu()"
    command = [sys.executable, "-c", code, "metrics", "-A", APP, "--listen", "127.0.0.1:0"]
    with running(command, log, env=worker_env(redis_url)) as process:
        line = wait_for_line(process, log, "metrics: ", 60)
        url = re.search(r"http://\S+", line)[0]
        assert sum(Page(get(url)[1]).by_label("sdtpu_requests_waiting").values()) == 0
        generate.delay("a fox")
        assert sum(Page(get(url)[1]).by_label("sdtpu_requests_waiting").values()) == 1
        process.terminate()
        assert process.wait(60) == 0


def test_a_broker_that_is_away_and_an_address_that_is_none_are_clear_errors(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    done = CliRunner().invoke(sdtpu, ["metrics", "-A", APP, "--listen", "nowhere"])
    assert done.exit_code == 1
    assert "--listen must be" in done.output


def test_without_the_package_that_writes_the_format_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "sdtpu_worker.operations.exposition", raising=False)
    done = CliRunner().invoke(sdtpu, ["metrics", "-A", APP])
    assert done.exit_code == 1
    assert "pip install 'sdtpu_worker[metrics]'" in done.output


def test_a_worker_with_the_documented_rights_reads_what_waits_and_one_with_fewer_says_nothing(app):
    with private_redis() as url, Redis.from_url(url) as admin:
        admin.execute_command(*documented_rules("sdtpu-worker", password="secret"))
        admin.lpush("sdtpu", '{"headers": {"sdtpu_sent_at": 1}}')
        lists, bands, now = {"sdtpu": ["sdtpu", "sdtpu\x06\x163"]}, [0, 3], [100.0]
        with Redis.from_url(url.replace("redis://", "redis://sdtpu-worker:secret@")) as client:
            watch = QueueWatch(15.0, clock=lambda: now[0])
            watch.follow_lists(lists, bands)
            assert watch.figures() == {}
            watch.look(client)
            assert watch.figures()["sdtpu_requests_waiting"] == {("sdtpu", "0"): 1, ("sdtpu", "3"): 0}
            now[0] += 16
            assert watch.figures() == {}  # nothing rather than what was true a while ago
            admin.execute_command("ACL", "SETUSER", "sdtpu-worker", "-lindex")
            watch.look(client)
            assert watch.figures() == {}


def documented_rules(user: str, password: str) -> list[str]:
    """Return the command by which SECURITY.md makes a user."""
    (line,) = re.findall(rf"^    (ACL SETUSER {user} .*)$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    return line.replace("WORKER_PASSWORD", password).split()
