"""What is counted of ticks and jobs, without a worker: the arithmetic of histograms, and which share goes where."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore, Retry

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.device_loop.submission import Finished
from sdtpu_worker.errors import GenerationFailed, InvalidRequest
from sdtpu_worker.operations.exposition import expose_worker
from sdtpu_worker.operations.figures import MOST_SERIES, Figures, Histogram
from sdtpu_worker.operations.metric_table import METRICS, OUTCOMES, Kind
from sdtpu_worker.worker.job_ends import JobLeft, end_of
from sdtpu_worker.worker.job_record import JobRecord, count_end, log_end
from sdtpu_worker.worker.tick_meter import TickMeter
from tests.observe.scraping import Page

LANE = (64, 64)


def test_names_have_base_units_and_counters_end_in_total():
    for metric in METRICS.values():
        assert metric.name.startswith("sdtpu_")
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert not metric.name.endswith(("_ms", "_us", "_kb", "_mb", "_percent"))
        if metric.kind is Kind.HISTOGRAM:
            assert metric.name.endswith(("_seconds", "_ratio"))
            assert metric.buckets == tuple(sorted(metric.buckets))
        assert not {"task", "task_id", "tenant", "prompt"} & set(metric.labels)
        assert metric.help
        assert not metric.help.endswith(".")


def counts_of(figures: Figures) -> dict[tuple[str, ...], float]:
    counts: Any = figures.read()["sdtpu_requests_total"]
    return {labels: count for labels, count in counts.items() if count}


def test_ends_that_are_known_count_from_zero_so_that_a_rise_is_seen():
    counts: Any = Figures().read()["sdtpu_requests_total"]
    assert counts["redelivered", "died"] == counts["refused", "InvalidRequest"] == 0
    assert {outcome for outcome, _ in counts} == set(OUTCOMES)
    assert len(counts) < MOST_SERIES / 2


def test_a_value_falls_into_the_first_bucket_that_holds_it():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 6.0):
        histogram.observe(value)
    assert histogram.read() == ((2, 1, 1, 1), 14.0)


def test_threads_that_count_at_the_same_time_lose_nothing():
    figures = Figures()

    def count() -> None:
        for _ in range(2000):
            figures.count("sdtpu_requests_total", "succeeded", "")
            figures.observe("sdtpu_store_seconds", 0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts_of(figures) == {("succeeded", ""): 8000}
    assert sum(figures.histograms["sdtpu_store_seconds"].read().counts) == 8000


def test_the_number_of_series_is_bounded_whatever_the_classes_of_errors_are():
    figures = Figures()
    for number in range(10 * MOST_SERIES):
        figures.count("sdtpu_requests_total", "failed", f"Error{number}")
    counts: Any = figures.read()["sdtpu_requests_total"]
    assert len(counts) == MOST_SERIES + 1
    assert counts_of(figures)["failed", "other"] > 9 * MOST_SERIES


def test_the_parts_of_a_tick_get_their_expected_shares_of_its_time():
    figures = Figures()
    meter = TickMeter(figures, {LANE: TickCosts(2, Cost(step_s=0.01, insert_s=0.02, decode_s=0.03))}, num_slots=4)
    phases = (Phase(decode=(0, "a"), insert=(0, "b"), steps=5),)  # 0.1 s of work, which takes twice as long
    meter(Plan(LANE, (phases, ()), occupied=1, work_s=(0.1, 0.0), steps_done={"b": 5}), 10.0, 10.2)
    sums = {name: figures.histograms[f"sdtpu_{name}_seconds"].read().total for name in ("step", "insert", "decode")}
    assert sums == pytest.approx({"step": 0.02, "insert": 0.04, "decode": 0.06})
    assert figures.histograms["sdtpu_tick_seconds"].read().total == pytest.approx(0.2)
    assert figures.histograms["sdtpu_tick_occupancy_ratio"].read().total == 0.25
    parked = Plan(LANE, ((), ()), parked=(Place("a", 0, 0), Place("b", 1, 0)), resumed=(Place("c", 0, 0),))
    meter(parked, 10.2, 10.3)
    assert counts_of(figures) == {("preempted", ""): 2, ("resumed", ""): 1}


def raised(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except BaseException:
        return ExceptionInfo()


@pytest.mark.parametrize(
    ("result", "end"),
    [
        ((0, "{}", 0.1), ("succeeded", "")),
        ((1, raised(GenerationFailed("x")), 0.1), ("failed", "GenerationFailed")),
        ((1, raised(InvalidRequest("x")), 0.1), ("refused", "InvalidRequest")),
        ((1, raised(Retry("again", exc=OSError("x"))), 0.1), ("retried", "OSError")),
        ((1, raised(Retry("again")), 0.1), ("retried", "")),
        ((1, raised(Ignore()), 0.1), ("revoked", "Ignore")),
        (JobLeft(lambda: None, "expired"), ("expired", "")),
        (JobLeft(lambda: None, "handed_over", "devices"), ("handed_over", "devices")),
    ],
)
def test_an_end_has_a_name_and_a_reason(result, end):
    assert end_of(result) == end
    assert end[0] in OUTCOMES


def make_record() -> JobRecord:
    record = JobRecord("a-task", received_at=100.0, waited_before_s=2.0)
    record.finished = Finished(None, 1, 0, 3, started_at=101.0, finished_at=105.0)
    record.stages = {"prepare": (100.0, 100.5), "check safety": (105.0, 105.1), "store": (105.1, 105.4)}
    record.stored_at, record.outcome, record.came_from = 106.0, "succeeded", "died"
    return record


def test_a_record_counts_what_the_job_came_to():
    figures = Figures()
    count_end(make_record(), figures)
    assert counts_of(figures) == {("succeeded", ""): 1, ("redelivered", "died"): 1}
    sums = {name: each.read().total for name, each in figures.histograms.items() if sum(each.read().counts)}
    assert sums == pytest.approx(
        {
            "sdtpu_request_queue_time_seconds": 3.0,
            "sdtpu_request_inference_time_seconds": 4.0,
            "sdtpu_e2e_request_latency_seconds": 8.0,
            "sdtpu_prepare_seconds": 0.5,
            "sdtpu_store_seconds": 0.3,
        }
    )


def test_a_page_that_counts_a_job_as_ended_has_its_times_too():
    """It had the end without them when it was read in between."""
    pages: list[Page] = []

    class Scraped(Figures):
        """Is read at every step of a job's end, and a job ends while it is read."""

        def count(self, name: str, *labels: str, by: int = 1) -> None:
            super().count(name, *labels, by=by)
            self.scrape()

        def observe(self, name: str, value: float) -> None:
            super().observe(name, value)
            self.scrape()

        def scrape(self) -> None:
            pages.append(Page(expose_worker(self)[1].decode()))

    class Ending(Figures):
        def read(self) -> Any:
            count_end(make_record(), self)
            return super().read()

    count_end(make_record(), Scraped())
    pages.append(Page(expose_worker(Ending())[1].decode()))
    ended = [page for page in pages if page.value("sdtpu_requests_total", outcome="succeeded", reason="")]
    assert ended
    for page in ended:
        assert page.value("sdtpu_requests_total", outcome="redelivered", reason="died") == 1
        for name in ("request_queue_time", "request_inference_time", "e2e_request_latency", "prepare", "store"):
            assert page.value(f"sdtpu_{name}_seconds_count") == 1, name


def test_a_job_that_was_revoked_in_its_slot_says_how_far_it_was(caplog):
    record = JobRecord("a-task", outcome="revoked", reason="terminated")
    record.submission = SimpleNamespace(started_at=record.received_at, steps_done=7, device=2)  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "sdtpu_worker.worker.job_record"):
        log_end(record)
    assert "task a-task revoked (terminated): waited 0.00 s, 7 steps in 0.00 s on device 2" in caplog.text
    assert caplog.records[0].job["steps"] == 7
