"""The fake worker of tests/chaos with OpenTelemetry's Celery instrumentation, as an app sets it up.

Its spans stay in memory; when the worker stops, it writes them to the file `SPANS_FILE`, one JSON object each. Its
devices take time for an insert and a decode too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from celery import signals

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.config import Config
from tests.chaos.fake_worker import FakeDevicePool, PictureEngine, app
from tests.chaos.pictures import LANE

__all__ = ["app"]


class SlowEngine(PictureEngine):
    """Takes 5 ms for an insert, a step and a decode each."""

    def __init__(self, devices: int) -> None:
        super().__init__(devices, 1, 0.005)
        self.costs = {LANE: TickCosts(devices, Cost(0.005, 0.005, 0.005))}


class SlowPool(FakeDevicePool):
    """The pool on this engine."""

    @staticmethod
    def make_engine(config: Config, on_phase: Callable[[str], None]) -> SlowEngine:
        """Make the engine at once."""
        return SlowEngine(config.cpu_devices)


app.conf.worker_pool = "tests.observe.traced_worker:SlowPool"


@signals.worker_process_init.connect
def instrument(**_: object) -> None:
    """Set OpenTelemetry up where its documentation says that a worker should."""
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()

    def write(**_: object) -> None:
        spans = [json.dumps(json.loads(span.to_json())) for span in exporter.get_finished_spans()]
        Path(os.environ["SPANS_FILE"]).write_text("\n".join(spans))

    signals.worker_shutdown.connect(write, weak=False)
