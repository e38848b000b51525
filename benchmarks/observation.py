"""What metrics and traces cost a worker: microseconds for a tick and for a job, without devices and without a broker.

    python benchmarks/observation.py

Two cores of an x86 server, Python 3.11, November 2026, eight devices: a tick 3 to 10 us for its figures, 0.2 us for
spans while no job is traced, 50 to 110 us with eight traced jobs; a job 4 us when it ends; a scrape 1 to 2 ms. A tick
lasts 100,000 us.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.device_loop.submission import Finished
from sdtpu_worker.operations.exposition import expose_worker
from sdtpu_worker.operations.figures import Figures
from sdtpu_worker.operations.find_tracing import find_tracing
from sdtpu_worker.worker.job_record import JobRecord, count_end
from sdtpu_worker.worker.tick_meter import TickMeter
from sdtpu_worker.worker.tick_spans import TickSpans

LANE, DEVICES = (512, 512), 8
COSTS = {LANE: TickCosts(DEVICES, Cost(0.01, 0.02, 0.03))}


def plan_of(*phases: Phase) -> Plan:
    """Return a tick in which every device does the same."""
    steps = {str(device): 5 for device in range(DEVICES)}
    return Plan(LANE, (phases,) * DEVICES, occupied=DEVICES, work_s=(0.05,) * DEVICES, steps_done=steps)


def show(name: str, call: Callable[[], object], number: int = 5000) -> None:
    """Print the microseconds of a call: the best of five series."""
    seconds = min(timeit.repeat(call, number=number, repeat=5)) / number
    print(f"{name:45} {1e6 * seconds:8.1f} us")


def trace_eight_jobs(spans: TickSpans, tick: Plan) -> None:
    """Show a tick of traced jobs, where OpenTelemetry's SDK is installed."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    trace.set_tracer_provider(provider)
    with trace.get_tracer("benchmark").start_as_current_span("task"):
        for task_id in tick.steps_done:
            spans._tracing.follow(task_id)
    show("a tick of eight traced jobs, spans", lambda: spans(tick, 1.0, 1.1), number=500)


def main() -> None:
    """Print all costs."""
    figures, tracing = Figures(), find_tracing("benchmark", False)
    meter, spans = TickMeter(figures, COSTS, DEVICES), TickSpans(tracing, COSTS, DEVICES)
    quiet, busy = plan_of(Phase(steps=5)), plan_of(Phase(decode=(0, "a"), insert=(0, "b"), steps=5))
    show("a tick of steps alone, figures", lambda: meter(quiet, 1.0, 1.1))
    show("a tick in which every slot changes, figures", lambda: meter(busy, 1.0, 1.1))
    show("a tick without a traced job, spans", lambda: spans(quiet, 1.0, 1.1))
    record = JobRecord("a-task", outcome="succeeded", stored_at=3.0)
    record.finished = Finished(None, 0, 0, 5, started_at=1.0, finished_at=2.0)
    record.stages = {"prepare": (0.0, 0.1), "encode": (2.0, 2.1), "store": (2.1, 2.2)}
    show("the end of a job, figures", lambda: count_end(record, figures))
    show("a scrape", lambda: expose_worker(figures), number=20)
    try:
        trace_eight_jobs(spans, quiet)
    except ImportError:
        print("OpenTelemetry's SDK is not installed: pip install 'sdtpu_worker[otel]'")


if __name__ == "__main__":
    main()
