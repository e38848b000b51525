"""What the device loop needs of the jobs, the engine and the policy: it knows neither Celery nor JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Plan


class Job(Protocol):
    """What the loop reads of a prepared job; the rest is between the host's preparation and the engine."""

    @property
    def task_id(self) -> str: ...
    @property
    def lane(self) -> Lane: ...
    @property
    def num_inference_steps(self) -> int: ...


class ExecutedTick(Protocol):
    """A dispatched plan.

    `parked` has the states of the jobs that it took off their slots, by task id; after `wait`, `previews` has the
    small pictures that were asked for, and `done_at` the time when the devices were done, if that is known.
    """

    @property
    def parked(self) -> Mapping[str, Any]: ...
    @property
    def previews(self) -> Mapping[str, Any]: ...
    @property
    def done_at(self) -> float | None: ...
    def wait(self) -> list[Any]:
        """Block until it is done; return objects with `task_id`, `device`, `slot`, `pixels`, `finite`."""


class DeviceEngine(Protocol):
    """The device contract: the engine never chooses."""

    def execute(self, plan: Plan, jobs: Mapping[str, Any], snapshots: Mapping[str, Any]) -> ExecutedTick: ...
    def accepts(self, snapshot: Any) -> bool:
        """Whether a job can go on from a snapshot here, bit for bit."""

    def reset(self) -> None: ...


class Policy(Protocol):
    """Who makes the plans; see `sdtpu_worker.aggregator.policy.Aggregator`."""

    num_devices: int

    def add(
        self, task_id: str, lane: Lane, num_steps: int, now: float, terms: Terms | None, steps_done: int = 0
    ) -> None: ...
    def cancel(self, task_id: str) -> bool: ...
    def overdue(self, now: float) -> list[tuple[str, Overdue]]: ...
    def plan(self, now: float) -> Plan | None: ...
    def expected_s(self, plan: Plan) -> float: ...
    def update(self, outcome: Outcome) -> None: ...
    def etas_s(self, now: float) -> Mapping[str, float]: ...
    def lowest_priority_running(self) -> int | None: ...
    def counts(self) -> Mapping[str, int]: ...
