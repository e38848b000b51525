"""Where a worker's spans go: to OpenTelemetry where that is installed, and nowhere, at no cost, where it is not."""

from __future__ import annotations

import importlib.util

from sdtpu_worker.operations.tracing import NoTracing, Tracing


def find_tracing(version: str, with_prompts: bool) -> Tracing:
    """Return what makes spans; it imports OpenTelemetry only where that is installed.

    Args:
        version: of this package, for the spans.
        with_prompts: `sdtpu_log_prompts`.
    """
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.trace") is None:
        return NoTracing()
    from sdtpu_worker.operations.spans import SpanTracing

    return SpanTracing(version, with_prompts)
