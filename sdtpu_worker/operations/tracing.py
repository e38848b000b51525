"""What a worker tells whoever makes spans of its jobs, and the one that makes none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Parts:
    """When the parts of a tick that concern one job began and ended, on `time.monotonic()`'s clock.

    Attributes:
        insert, decode: of the job; None where the tick had no such part for it.
        steps_done: denoising steps that the job had taken when the tick was over.
    """

    insert: tuple[float, float] | None = None
    decode: tuple[float, float] | None = None
    steps_done: int = 0


@dataclass(frozen=True)
class DeviceTime:
    """How a job went through the device loop, on `time.monotonic()`'s clock.

    Attributes:
        arrived_at: when the loop got it.
        started_at: when it got its slot; None if it has had none.
        ended_at: when it left the loop.
        facts: attributes of its spans.
        failure: the class of the error that ended it; None unless the devices failed on it.
    """

    arrived_at: float
    started_at: float | None
    ended_at: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None


class Tracing(Protocol):
    """What a worker tells of its jobs and its ticks. `tick` runs in the device loop's thread, the rest in the jobs'."""

    @property
    def is_following(self) -> bool:
        """Whether there is a job whose ticks are wanted."""

    def describe(self, attributes: Mapping[str, Any], prompt: str, negative_prompt: str) -> None:
        """Say what the calling thread's task is, on the span that Celery's instrumentation has made for it.

        Args:
            attributes: of the span; those that are None are left out.
            prompt, negative_prompt: left out unless `sdtpu_log_prompts` is on.
        """

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Measure a part of the host's work that the calling thread does in this block."""

    def follow(self, task_id: str) -> None:
        """Keep the ticks of a job from now on, for the span of the calling thread's task."""

    def finish(self, task_id: str, way: DeviceTime) -> None:
        """Make the spans of the device's work on a job that `follow` was told of."""

    def tick(self, started_at: float, ended_at: float, jobs: Mapping[str, Parts], facts: Mapping[str, Any]) -> None:
        """Take note of a tick that ended without a failure."""


class NoTracing:
    """Makes no spans."""

    is_following = False

    def describe(self, attributes: Mapping[str, Any], prompt: str, negative_prompt: str) -> None:
        """Do nothing."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Do nothing."""
        return contextlib.nullcontext()

    def follow(self, task_id: str) -> None:
        """Do nothing."""

    def finish(self, task_id: str, way: DeviceTime) -> None:
        """Do nothing."""

    def tick(self, started_at: float, ended_at: float, jobs: Mapping[str, Parts], facts: Mapping[str, Any]) -> None:
        """Do nothing."""
