"""What a device worker shows of itself: the figures of `/metrics`, and the spans of its jobs and ticks.

It reads the parts of the worker, or is told by them; none of them needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import sdtpu_worker
from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.operations.figures import Figures
from sdtpu_worker.operations.find_tracing import find_tracing
from sdtpu_worker.operations.health import WorkerHealth
from sdtpu_worker.operations.health_http import Page
from sdtpu_worker.worker.queue_watch import QueueWatch
from sdtpu_worker.worker.tick_meter import TickMeter
from sdtpu_worker.worker.tick_spans import TickSpans
from sdtpu_worker.worker.worker_figures import delivery_figures, health_figures, serving_figures

if TYPE_CHECKING:
    from sdtpu_worker.device_loop.protocols import ServingEngine
    from sdtpu_worker.worker.serving import Serving

_MOST_STALE_S = 15.0
"""How old what was seen of the queues may be: three times the pause between two looks."""


class Observation:
    """Made with the worker's services; its parts are added as they are made.

    Args:
        health: what `/livez` and `/readyz` say.
        with_prompts: `sdtpu_log_prompts`.

    Attributes:
        figures: what `/metrics` says.
        tracing: where spans go.
        queues: what waits in the queues that the worker consumes.
    """

    def __init__(self, health: WorkerHealth, with_prompts: bool) -> None:
        self.figures = Figures()
        self.tracing = find_tracing(sdtpu_worker.__version__, with_prompts)
        self.queues = QueueWatch(_MOST_STALE_S)
        self.figures.read_from(partial(health_figures, health))

    def pages(self) -> Mapping[str, Page]:
        """Return the pages of the health server by path.

        Raises:
            ImportError: `prometheus_client` is not installed; a worker without an address does not need it.
        """
        from sdtpu_worker.operations.exposition import expose_worker

        return {"/metrics": partial(expose_worker, self.figures)}

    def watch_ticks(self, engine: ServingEngine) -> Callable[[Plan, float, float], None]:
        """Return what the device loop should tell of every tick of an engine."""
        num_slots = engine.info.num_slots
        meter = TickMeter(self.figures, engine.costs, num_slots)
        spans = TickSpans(self.tracing, engine.costs, num_slots)

        def on_tick(plan: Plan, started_at: float, ended_at: float) -> None:
            meter(plan, started_at, ended_at)
            spans(plan, started_at, ended_at)

        return on_tick

    def watch_serving(self, serving: Serving) -> None:
        """Read the figures of an engine and its device loop from now on."""
        self.figures.read_from(partial(serving_figures, serving))

    def watch_dead_letters(self, deliveries: Deliveries) -> None:
        """Count the messages that the worker dead-letters."""
        deliveries.on_dead_letter = partial(self.figures.count, "sdtpu_requests_total", "refused")

    def watch_deliveries(self, deliveries: Deliveries, lease: Lease) -> None:
        """Read the figures of the held messages from now on, and of what waits for them."""
        self.figures.read_from(partial(delivery_figures, deliveries, lease))
        self.figures.read_from(self.queues.figures)

    def follow(self, consumer: Any, prefix: str) -> None:
        """Look at the queues of Celery's consumer from now on; see `QueueWatch.follow`."""
        self.queues.follow(consumer, prefix)
