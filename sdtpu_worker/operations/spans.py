"""Spans of OpenTelemetry, inside the span that its Celery instrumentation makes for a task.

The device loop works for many jobs at once in threads of its own, so the spans of that work are made when a job leaves
it, with the times that were measured. A span of a tick stands in a trace of its own and has links to its jobs' spans.
Only this module imports OpenTelemetry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Status, StatusCode

from sdtpu_worker.operations.tracing import DeviceTime, Parts

_PREFIX = "sdtpu."
_Tick = tuple[float, Parts, Mapping[str, Any]]
"""When a tick ended, what it did for one job, and attributes of the tick."""


@dataclass
class _Followed:
    """A job in the device loop: the context of its task's span, and the ticks that it was in."""

    context: SpanContext
    ticks: list[_Tick] = field(default_factory=list)


class SpanTracing:
    """Makes spans for tasks whose own span is recorded; for others it does nothing.

    Args:
        version: of this package.
        with_prompts: whether spans may have prompts.
    """

    def __init__(self, version: str, with_prompts: bool) -> None:
        self._with_prompts = with_prompts
        self._tracer = trace.get_tracer("sdtpu_worker", version)
        self._followed: dict[str, _Followed] = {}

    def describe(self, attributes: Mapping[str, Any], prompt: str, negative_prompt: str) -> None:
        """Set attributes of the current span."""
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if self._with_prompts:
            messages = [{"role": "user", "parts": [{"type": "text", "content": prompt}]}]
            span.set_attribute("gen_ai.input.messages", json.dumps(messages))
            span.set_attribute("sdtpu.negative_prompt", negative_prompt)

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Make a span of what is done in this block."""
        if not trace.get_current_span().is_recording():
            return nullcontext()
        return self._tracer.start_as_current_span(_PREFIX + name)

    def follow(self, task_id: str) -> None:
        """Keep the ticks of a job, if its task's span is recorded."""
        span = trace.get_current_span()
        if span.is_recording():
            self._followed[task_id] = _Followed(span.get_span_context())

    @property
    def is_following(self) -> bool:
        """Whether a job whose task's span is recorded is in the device loop."""
        return bool(self._followed)

    def finish(self, task_id: str, way: DeviceTime) -> None:
        """Make the spans `wait`, `insert`, `denoise` and `decode`, as far as the job came."""
        if (followed := self._followed.pop(task_id, None)) is None:
            return
        if way.started_at is None:
            self._span("wait", way.arrived_at, way.ended_at, way.facts, way.failure)
            return
        self._span("wait", way.arrived_at, way.started_at, way.facts)
        parts = [each for _, each, _ in reversed(followed.ticks)]
        insert = next((each.insert for each in parts if each.insert), None)
        decode = next((each.decode for each in parts if each.decode), None)
        if insert is not None:
            self._span("insert", *insert, way.facts)
        began_at, done_at = insert[1] if insert else way.started_at, decode[0] if decode else way.ended_at
        self._span("denoise", began_at, done_at, way.facts, way.failure, followed.ticks)
        if decode is not None:
            self._span("decode", *decode, way.facts)

    def tick(self, started_at: float, ended_at: float, jobs: Mapping[str, Parts], facts: Mapping[str, Any]) -> None:
        """Note a tick at each of its jobs, and make a span with links to them."""
        links = []
        for task_id, parts in jobs.items():
            if (followed := self._followed.get(task_id)) is not None:
                followed.ticks.append((ended_at, parts, facts))
                links.append(Link(followed.context))
        if links:
            span = self._tracer.start_span(
                _PREFIX + "tick", Context(), attributes=facts, links=links, start_time=_nanoseconds(started_at)
            )
            span.end(_nanoseconds(ended_at))

    def _span(
        self,
        name: str,
        started_at: float,
        ended_at: float,
        facts: Mapping[str, Any],
        failure: str | None = None,
        ticks: Iterable[_Tick] = (),
    ) -> None:
        """Make a span of what was done between two times for the calling thread's task."""
        span = self._tracer.start_span(_PREFIX + name, attributes=facts, start_time=_nanoseconds(started_at))
        for at, parts, of_tick in ticks:
            span.add_event("tick", {"sdtpu.steps_done": parts.steps_done, **of_tick}, _nanoseconds(at))
        if failure is not None:
            span.set_attribute("error.type", failure)
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(ended_at))


def _nanoseconds(at: float) -> int:
    """Return a time of `time.monotonic()` in nanoseconds since 1970."""
    return time.time_ns() - round(1e9 * (time.monotonic() - at))
