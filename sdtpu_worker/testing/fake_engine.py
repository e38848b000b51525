"""An engine that counts instead of drawing: a double for tests, which needs neither JAX nor a device.

It keeps the contract of `sdtpu_worker.device_loop.protocols.DeviceEngine`.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.jobs import NO_LOAD, Load
from sdtpu_worker.aggregator.plan import Lane, Plan
from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.errors import SnapshotMismatch

_MOST_SNAPSHOT_BYTES = 4096
_NAN = -(10**12)  # a count stays negative whatever steps are added to it

if TYPE_CHECKING:
    import numpy as np

    from sdtpu_worker.device_loop.protocols import DeviceEngine


@dataclass(frozen=True)
class FakeJob:
    """What a `DeviceLoop` reads of a job, and the number from which `FakeEngine` counts."""

    task_id: str
    num_steps: int
    lane: Lane = (64, 64)
    value: int = 0
    load: Load = field(default=NO_LOAD, kw_only=True)

    def finish(self, pixels: Any) -> Any:
        """Return what was decoded: there are no masks."""
        return pixels


@dataclass(frozen=True)
class FakeImage:
    """What `FakeEngine` decodes; `pixels` is what `FakeEngine.draw` makes of the job's value plus its steps."""

    task_id: str
    device: int
    slot: int
    pixels: Any
    finite: bool = True


@dataclass(frozen=True)
class FakeSnapshot:
    """The state of a job of a `FakeEngine`; a negative value stands for NaN."""

    task_id: str
    value: int
    step: int
    steps_left: int
    fingerprint: str = "fake"

    @property
    def finite(self) -> bool:
        """Whether the value is a number."""
        return self.value >= 0

    def to_bytes(self) -> bytes:
        """Return it as JSON text."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, num_steps: int | None = None) -> FakeSnapshot:
        """Read what `to_bytes` wrote, from bytes of any origin.

        Args:
            data: the bytes.
            num_steps: steps of the job that the snapshot must be of; None for any.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot of such a job.
        """
        if len(data) > _MOST_SNAPSHOT_BYTES:
            raise SnapshotMismatch(f"{len(data):,} bytes are no fake snapshot: start the job anew")
        try:
            snapshot = cls(**json.loads(data))
        except (TypeError, ValueError, RecursionError) as exc:
            raise SnapshotMismatch("these bytes are no fake snapshot: start the job anew") from exc
        step, left = snapshot.step, snapshot.steps_left
        types = [type(value) for value in vars(snapshot).values()]
        if types != [str, int, int, int, str] or min(step, left) < 0 or not 1 <= step + left <= MAX_STEPS:
            raise SnapshotMismatch("these bytes are no fake snapshot: start the job anew")
        if num_steps not in (None, step + left):
            raise SnapshotMismatch(f"the fake snapshot is of a job of {step + left:,} steps: start the job anew")
        return snapshot


class FakeDeviceLost(RuntimeError):
    """What a `FakeEngine` raises when its devices are lost: no other try can mend that."""


class FakeEngine:
    """An engine whose arithmetic can be checked by hand: an insert puts the job's `value` into the slot, a step adds 1.

    A job of value 100 and 7 steps is decoded as 107, whatever device and slot it had, and however often it was
    parked. Like the real engine, it advances all slots of a device, but no job beyond its number of steps.

    Args:
        fail_at: numbers of `execute` calls, from 0, that raise instead.
        fail_late_at: numbers of `execute` calls whose tick raises in `wait`, as a device that fails while it works.
        gate: when given, every tick's `wait` blocks until it is set: a device that hangs.
        costs: when given, a tick takes as long as these say at the start, in real time, one tick after the other. A
            policy may correct the same objects: the engine does not get slower by what a policy learns.
        poison: tasks that make every tick fail late that they have a slot in.
        nan: tasks whose images are not finite.
        fatal_at: numbers of `execute` calls whose tick fails late and for good: `recover` raises from then on.
        nan_devices: sick devices: every state that takes a step there becomes NaN.
        raising_devices: sick devices: every tick fails late in which they have something to do.
        unseen: sick devices that draw the reference image nevertheless, so that `check_devices` does not find them.
        lost_devices: devices that did not draw the reference image at the start.
    """

    def __init__(
        self,
        fail_at: tuple[int, ...] = (),
        gate: threading.Event | None = None,
        costs: Mapping[Lane, TickCosts] | None = None,
        fail_late_at: tuple[int, ...] = (),
        poison: frozenset[str] = frozenset(),
        nan: frozenset[str] = frozenset(),
        fatal_at: tuple[int, ...] = (),
        nan_devices: Collection[int] = (),
        raising_devices: Collection[int] = (),
        unseen: Collection[int] = (),
        lost_devices: Collection[int] = (),
    ) -> None:
        self.fail_at, self.fail_late_at, self.gate = fail_at, fail_late_at, gate
        self.poison, self.nan, self.fatal_at = poison, nan, fatal_at
        self.costs: Mapping[Lane, TickCosts] = costs or {}
        self._durations = copy.deepcopy(self.costs)
        self.nan_devices, self.raising_devices, self.unseen = nan_devices, raising_devices, unseen
        self.lost_devices = lost_devices
        self.calls = self.recoveries = self.checks = 0
        self.is_lost = False
        self.slots: dict[tuple[Lane, int, int], FakeSnapshot] = {}  # by (lane, device, slot)
        self.ticks: list[frozenset[str]] = []  # the tasks that had a slot in each tick
        self._free_at = 0.0

    def execute(
        self, plan: Plan, jobs: Mapping[str, FakeJob], snapshots: Mapping[str, FakeSnapshot] | None = None
    ) -> FakeTick:
        """Follow a plan."""
        self.calls += 1
        if self.calls - 1 in self.fail_at:
            raise RuntimeError("the fake device failed, as it was told to")
        parked = {p.task_id: self.slots.pop((plan.lane, p.device, p.slot)) for p in plan.parked}
        for place in plan.resumed:
            self.slots[plan.lane, place.device, place.slot] = (snapshots or {})[place.task_id]
        there = {state.task_id for place, state in self.slots.items() if place[0] == plan.lane}
        self.ticks.append(frozenset(there.union(plan.inserted())))
        images = []
        for d, phases in enumerate(plan.devices):
            for phase in phases:
                if phase.decode:
                    held = self.slots.pop((plan.lane, d, phase.decode[0]))
                    finite = held.finite and held.task_id not in self.nan
                    images.append(FakeImage(held.task_id, d, phase.decode[0], held.value, finite))
                if phase.insert:
                    job = jobs[phase.insert[1]]
                    state = FakeSnapshot(job.task_id, job.value, 0, job.num_steps)
                    self.slots[plan.lane, d, phase.insert[0]] = state
                self._advance(plan.lane, d, phase.steps)
        if self._durations:
            self._free_at = max(self._free_at, time.monotonic()) + self._durations[plan.lane].tick_s(plan)
        failure = self._failure_of(self.calls - 1, {d for d, phases in enumerate(plan.devices) if phases})
        return FakeTick(images, parked, self.gate, self._free_at, failure, self.draw)

    def draw(self, count: int) -> Any:
        """Return the pixels of a job that ends with this count: the count itself. A subclass may draw something."""
        return count

    def is_fatal(self, exc: Exception) -> bool:
        """Return whether the devices are lost."""
        return isinstance(exc, FakeDeviceLost)

    def recover(self, lost: Collection[int] = ()) -> Collection[int]:
        """Empty every slot, and return the sick devices; raise if all devices are lost."""
        self.recoveries += 1
        if self.is_lost:
            raise FakeDeviceLost("the fake device is lost")
        self.reset()
        return self._sick(lost)

    def check_devices(self, lost: Collection[int] = ()) -> Collection[int]:
        """Return the sick devices."""
        self.checks += 1
        return self._sick(lost)

    def accepts(self, snapshot: FakeSnapshot) -> bool:
        """Return whether a `FakeEngine` made the snapshot."""
        return snapshot.fingerprint == "fake"

    def reset(self) -> None:
        """Empty every slot."""
        self.slots.clear()

    def memory(self) -> Mapping[int, Mapping[str, int]]:
        """Return for each device a byte for each of its slots that hold a job, and a limit of a thousand."""
        devices = {device for costs in self.costs.values() for device in range(costs.num_devices)}
        used = Counter(device for _, device, _ in self.slots.copy())
        return {device: {"used": used[device], "peak": used[device], "limit": 1000} for device in sorted(devices)}

    def _sick(self, lost: Collection[int]) -> Collection[int]:
        return {*self.nan_devices, *self.raising_devices} - {*self.unseen, *lost}

    def _failure_of(self, call: int, busy: Collection[int]) -> Exception | None:
        if call in self.fatal_at:
            self.is_lost = True
            return FakeDeviceLost("the fake device is lost, as it was told to")
        if bad := self.poison & self.ticks[-1]:
            return RuntimeError(f"the fake device failed on {', '.join(sorted(bad))}")
        if sick := set(self.raising_devices) & set(busy):
            return RuntimeError(f"the fake device {min(sick)} is sick")
        if call in self.fail_late_at:
            return RuntimeError("the fake device failed at work, as it was told to")
        return None

    def _advance(self, lane: Lane, device: int, steps: int) -> None:
        for place, state in self.slots.items():
            if place[:2] == (lane, device):
                taken = min(steps, state.steps_left)
                value = _NAN if device in self.nan_devices and taken else state.value + taken
                self.slots[place] = FakeSnapshot(state.task_id, value, state.step + taken, state.steps_left - taken)


class FakeTick:
    """A plan that a `FakeEngine` followed."""

    def __init__(
        self,
        images: list[FakeImage],
        parked: Mapping[str, FakeSnapshot],
        gate: threading.Event | None,
        done_at: float,
        failure: Exception | None = None,
        draw: Callable[[int], Any] = int,
    ) -> None:
        self.parked: Mapping[str, FakeSnapshot] = parked
        self.previews: dict[str, np.ndarray] = {}
        self.done_at: float | None = None
        self._images, self._gate, self._done_at, self._failure, self._draw = images, gate, done_at, failure, draw

    def wait(self) -> list[FakeImage]:
        """Return the images as soon as the gate is open and the tick's time is over."""
        if self._gate is not None and not self._gate.wait(30):
            raise TimeoutError("the gate of a FakeEngine was not opened within 30 s")
        time.sleep(max(0.0, self._done_at - time.monotonic()))
        if self._failure is not None:
            raise self._failure
        return [replace(image, pixels=self._draw(image.pixels)) for image in self._images]


if TYPE_CHECKING:
    _: type[DeviceEngine] = FakeEngine  # mypy reports here what the double lacks of the contract
