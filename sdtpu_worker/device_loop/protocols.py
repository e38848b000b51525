"""What the device loop needs of the jobs, the engine and the policy: it knows neither Celery nor JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sdtpu_worker.aggregator.jobs import Admission, Overdue, Terms
from sdtpu_worker.aggregator.plan import Lane, Outcome, Place, Plan


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

    `parked` has the states of the jobs that it took off their slots, by task id: on the host after `wait`, on their
    way before. After `wait`, `previews` has the small pictures that were asked for, and `done_at` the time when the
    devices were done, if that is known.
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

    def is_fatal(self, exc: Exception) -> bool:
        """Whether no other try on these devices can mend what a program raised."""

    def recover(self) -> None:
        """Empty every slot after a failure and prove with a small tick that the devices still work; raise if not."""


class Policy(Protocol):
    """Who makes the plans; see `sdtpu_worker.aggregator.policy.Aggregator`."""

    num_devices: int

    def add(
        self, task_id: str, lane: Lane, num_steps: int, now: float, terms: Terms | None, steps_done: int = 0
    ) -> None: ...
    def cancel(self, task_id: str) -> bool: ...
    def overdue(self, now: float) -> list[tuple[str, Overdue]]: ...
    def plan(self, now: float, most_s: float = math.inf) -> Plan | None:
        """Return the next tick, if possible of no more than `most_s`, or None when there is nothing to do in it."""

    def admit(self, admission: Admission) -> None:
        """Give no slot to anybody else from now on, and take it from them."""

    def places(self) -> Mapping[Lane, Sequence[Place]]:
        """Return who has a slot, by lane."""

    def expected_s(self, plan: Plan) -> float: ...
    def update(self, outcome: Outcome) -> None: ...
    def etas_s(self, now: float) -> Mapping[str, float]: ...
    def lowest_priority_running(self) -> int | None: ...
    def counts(self) -> Mapping[str, int]: ...
