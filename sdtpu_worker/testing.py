"""Doubles for tests of code that uses this package; they need neither JAX nor a device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.aggregator.plan import Lane, Plan


@dataclass(frozen=True)
class FakeJob:
    """What a `DeviceLoop` reads of a job, and a number for `FakeEngine` to count with."""

    task_id: str
    num_inference_steps: int
    lane: Lane = (64, 64)
    value: int = 0


@dataclass(frozen=True)
class FakeImage:
    """What `FakeEngine` decodes; `pixels` is the job's value plus the steps that it was given."""

    task_id: str
    device: int
    slot: int
    pixels: int
    finite: bool = True


class FakeEngine:
    """An engine whose arithmetic can be checked by hand: inserting puts `value` into the slot, a step adds 1.

    A job of value 100 and 7 steps is decoded as 107, whatever device and slot it had. Like the real engine, it steps
    all of a device's slots, but none further than its number of steps.

    Args:
        fail_at: numbers of `execute` calls, from 0, that raise instead.
        gate: when given, every tick's `wait` blocks until it is set.
    """

    def __init__(self, fail_at: tuple[int, ...] = (), gate: threading.Event | None = None) -> None:
        self.fail_at, self.gate = fail_at, gate
        self.calls = 0
        self.slots: dict[tuple[Lane, int, int], list[Any]] = {}  # (lane, device, slot) -> [task_id, value, steps left]

    def execute(self, plan: Plan, jobs: Mapping[str, FakeJob]) -> _FakeTick:
        """Follow a plan."""
        self.calls += 1
        if self.calls - 1 in self.fail_at:
            raise RuntimeError("the fake device failed, as it was told to")
        images = []
        for d, device in enumerate(plan.devices):
            if device.insert:
                slot, task_id = device.insert
                job = jobs[task_id]
                self.slots[plan.lane, d, slot] = [task_id, job.value, job.num_inference_steps]
            for place, state in self.slots.items():
                if place[:2] == (plan.lane, d):
                    taken = min(device.steps, state[2])
                    state[1] += taken
                    state[2] -= taken
            if device.decode:
                slot, task_id = device.decode
                held, value, _ = self.slots.pop((plan.lane, d, slot))
                images.append(FakeImage(held, d, slot, value))
        return _FakeTick(images, self.gate)

    def reset(self) -> None:
        """Empty every slot."""
        self.slots.clear()


class _FakeTick:
    def __init__(self, images: list[FakeImage], gate: threading.Event | None) -> None:
        self._images, self._gate = images, gate

    def wait(self) -> list[FakeImage]:
        if self._gate is not None and not self._gate.wait(30):
            raise TimeoutError("the gate of a FakeEngine was not opened within 30 s")
        return self._images
