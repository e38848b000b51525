"""One trace from a web request to its picture: a real worker process with OpenTelemetry's Celery instrumentation."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sdtpu_worker import generate
from tests.chaos.fleet import Fleet, Ledger, WorkerProcess
from tests.support.waiting import wait_until

SECRET = "a prompt that nobody else may read"
OF_A_JOB = ["prepare", "wait", "insert", "denoise", "decode", "check safety", "encode", "store"]

pytestmark = pytest.mark.timeout(240)


class Web:
    """A web process: makes a span for each request, and enqueues in it."""

    def __init__(self, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
        self._tracer, self._exporter = provider.get_tracer("web"), exporter

    @contextlib.contextmanager
    def request(self) -> Iterator[str]:
        """Serve a request; yield the id of its trace."""
        with self._tracer.start_as_current_span("POST /images") as span:
            yield f"0x{span.get_span_context().trace_id:032x}"

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()


@pytest.fixture
def web() -> Iterator[Web]:
    """Instrument this process for the test, with a provider of its own."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield Web(provider, exporter)
    instrumentor.uninstrument()


class Traces:
    """The spans of a worker that has stopped."""

    def __init__(self, path: Path) -> None:
        self.spans: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]

    def of_trace(self, trace_id: str) -> dict[str, dict[str, Any]]:
        """Return the spans of a trace by name, without our prefix."""
        ours = [span for span in self.spans if span["context"]["trace_id"] == trace_id]
        assert len({span["name"] for span in ours}) == len(ours), [span["name"] for span in ours]
        return {span["name"].removeprefix("sdtpu."): span for span in ours}

    def ticks(self) -> list[dict[str, Any]]:
        """Return the spans of ticks."""
        return [span for span in self.spans if span["name"] == "sdtpu.tick"]


@pytest.fixture
def fleet(redis_url, tmp_path) -> Iterator[Fleet]:
    redis.Redis.from_url(redis_url).flushdb()
    app = "tests.observe.traced_worker"
    with Fleet(redis_url, tmp_path, app, SDTPU_CPU_DEVICES="2", SPANS_FILE=str(tmp_path / "spans")) as fleet:
        yield fleet


def stop(worker: WorkerProcess, tmp_path: Path) -> Traces:
    """Stop a worker; return its spans."""
    assert worker.stop() == 0, worker.text()
    return Traces(tmp_path / "spans")


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_the_web_request_the_task_and_our_spans_are_one_trace(fleet, app, web, tmp_path):
    worker, ledger = fleet.start("a"), Ledger()
    with web.request() as trace_id:
        task_id = ledger.add(7, 40, SECRET)
    ledger.wait(60)
    spans = stop(worker, tmp_path).of_trace(trace_id)
    published, request = web.spans
    assert (published.name, request.name) == ("apply_async/sdtpu.generate", "POST /images")
    assert published.parent.span_id == request.context.span_id
    task = spans.pop("run/sdtpu.generate")
    assert task["parent_id"] == f"0x{published.context.span_id:016x}"
    assert set(spans) == set(OF_A_JOB)
    assert {span["parent_id"] for span in spans.values()} == {task["context"]["span_id"]}
    assert {span["kind"] for span in spans.values()} == {"SpanKind.INTERNAL"}

    by_start = sorted(OF_A_JOB, key=lambda name: at(spans[name]["start_time"]))
    assert by_start == OF_A_JOB
    for name, span in spans.items():
        assert at(task["start_time"]) <= at(span["start_time"]) <= at(span["end_time"]) <= at(task["end_time"]), name
    lengths = {name: at(span["end_time"]) - at(span["start_time"]) for name, span in spans.items()}
    assert lengths["denoise"] >= 40 * 0.005 * 0.8
    assert min(lengths["insert"], lengths["decode"]) > 0.003
    assert max(lengths["insert"], lengths["decode"]) < lengths["denoise"]

    facts = task["attributes"]
    assert facts["messaging.message.id"] == task_id
    assert facts["messaging.destination.name"] == "sdtpu"
    assert facts["messaging.operation.type"] == "process"
    assert (facts["gen_ai.operation.name"], facts["gen_ai.output.type"]) == ("generate_content", "image")
    assert (facts["gen_ai.request.model"], facts["gen_ai.request.seed"]) == ("fake", 7)
    assert spans["denoise"]["attributes"]["sdtpu.slot"] == 0
    assert spans["denoise"]["attributes"]["sdtpu.steps_done"] == 40
    assert SECRET not in (tmp_path / "spans").read_text()


def test_each_tick_has_its_batch_and_links_to_its_jobs(fleet, app, web, tmp_path):
    worker, ledger = fleet.start("a"), Ledger()
    traces = []
    for seed in range(2):
        with web.request() as trace_id:
            ledger.add(seed, 600)
            traces.append(trace_id)
    ledger.wait(60)
    found = stop(worker, tmp_path)
    for trace_id in traces:
        events = found.of_trace(trace_id)["denoise"]["events"]
        steps = [event["attributes"]["sdtpu.steps_done"] for event in events]
        assert steps == sorted(steps)
        assert steps[-1] == 600
        assert {event["attributes"]["sdtpu.slots"] for event in events} == {2}
        assert 2 in {event["attributes"]["sdtpu.slots_busy"] for event in events}
    ticks = found.ticks()
    assert {span["parent_id"] for span in ticks} == {None}
    both = [span for span in ticks if len(span["links"]) == 2]
    assert both
    assert {link["context"]["trace_id"] for link in both[0]["links"]} == set(traces)
    assert both[0]["attributes"]["messaging.batch.message_count"] == 2


def test_prompts_are_in_the_trace_only_where_the_log_may_have_them(fleet, app, web, tmp_path):
    worker, ledger = fleet.start("a", SDTPU_LOG_PROMPTS="on"), Ledger()
    with web.request() as trace_id:
        ledger.add(1, 5, SECRET)
    ledger.wait(60)
    task = stop(worker, tmp_path).of_trace(trace_id)["run/sdtpu.generate"]
    assert json.loads(task["attributes"]["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
    ]


def test_a_job_that_fails_and_one_that_is_revoked_say_so(fleet, app, web, tmp_path):
    worker, ledger = fleet.start("a"), Ledger()
    with web.request() as failed:
        ledger.add(1, 20, "raise")
    ledger.wait(60)
    with web.request() as revoked:
        job = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 1000})
    wait_until(lambda: job.backend.get_task_meta(job.id, cache=False)["status"] == "STARTED")
    app.control.revoke(job.id, terminate=True)
    wait_until(lambda: job.backend.get_task_meta(job.id, cache=False)["status"] == "REVOKED")
    found = stop(worker, tmp_path)
    spans = found.of_trace(failed)
    assert spans["denoise" if "denoise" in spans else "wait"]["attributes"]["error.type"] == "GenerationFailed"
    spans = found.of_trace(revoked)
    assert "store" not in spans
    last = spans["denoise" if "denoise" in spans else "wait"]
    assert last["attributes"]["sdtpu.left_by"] == "JobCancelled"
    assert "error.type" not in last["attributes"]


def test_a_job_that_is_handed_over_stays_in_its_trace(fleet, app, web, tmp_path):
    first, ledger = fleet.start("a", SDTPU_GRACE_S="0", SPANS_FILE=str(tmp_path / "first")), Ledger()
    with web.request() as trace_id:
        task_id = ledger.add(1, 1000)
    wait_until(lambda: f"{task_id}] received" in first.text())
    job = app.AsyncResult(task_id)
    wait_until(lambda: job.backend.get_task_meta(task_id, cache=False)["status"] == "STARTED")
    assert first.stop() == 0
    second = fleet.start("b")
    ledger.wait(60)
    left = Traces(tmp_path / "first").of_trace(trace_id)
    done = stop(second, tmp_path).of_trace(trace_id)
    last = left["denoise" if "denoise" in left else "wait"]
    assert last["attributes"]["sdtpu.left_by"] == "JobHandedOver"
    assert "store" not in left
    assert {"wait", "denoise", "decode", "store"} <= set(done)
    assert done["denoise"]["attributes"]["sdtpu.steps_done"] == 1000


def test_where_nobody_traces_nothing_is_kept_and_no_sdk_is_loaded():
    code = """
import sys
from sdtpu_worker.operations.find_tracing import find_tracing
tracing = find_tracing("1", False)
with tracing.stage("store"):
    tracing.follow("a-task")
print(type(tracing).__name__, tracing.is_following, [name for name in sys.modules if "opentelemetry.sdk" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "SpanTracing False []\n"


def test_without_opentelemetry_nothing_of_it_is_imported():
    code = """
import sys
sys.modules["opentelemetry"] = None  # as where it is not installed
from sdtpu_worker.operations.find_tracing import find_tracing
import sdtpu_worker.worker.services
print(type(find_tracing("1", False)).__name__, [name for name in sys.modules if name.startswith("opentelemetry.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "NoTracing []\n"
