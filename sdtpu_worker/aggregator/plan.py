"""The policy: which job goes into which slot, how far every device goes, what is decoded. Pure: no clock, no
threads, no arrays.

Invariant: every job that was added leaves exactly once, decoded or cancelled; a slot holds at most one job; no slot
stays free while a job of its lane waits past one plan for it.

A lane is one resolution: its own compiled programs and its own slots on every device. Each plan is one tick of one
lane. Devices run their steps one after the other without asking the host, so the policy knows every slot's step
from what it planned: `plan` moves its own account on at once, and `update` only reports what the engine made of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Lane = tuple[int, int]


@dataclass(frozen=True)
class DeviceInstruction:
    """What one device does in a tick, in this order.

    Attributes:
        insert: `(slot, task_id)` of a job that starts, or None.
        steps: denoising steps for the device's slots.
        decode: `(slot, task_id)` of a job that is done after these steps, or None; its slot is free afterwards.
    """

    insert: tuple[int, str] | None = None
    steps: int = 0
    decode: tuple[int, str] | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.insert is None and self.decode is None and self.steps == 0


@dataclass(frozen=True)
class Plan:
    """One tick of one lane: an instruction for every device.

    `occupied` counts the lane's slots with a job in this tick.
    """

    lane: Lane
    devices: tuple[DeviceInstruction, ...]
    occupied: int


@dataclass(frozen=True)
class Outcome:
    """What became of a plan: the seconds from its start on the devices to its end."""

    plan: Plan
    elapsed_s: float


@dataclass
class _Slot:
    task_id: str
    remaining: int


@dataclass
class _LaneState:
    waiting: OrderedDict[str, int] = field(default_factory=OrderedDict)  # task id -> steps, in order of arrival
    slots: list[list[_Slot | None]] = field(default_factory=list)  # [device][slot]

    def has_work(self) -> bool:
        return bool(self.waiting) or any(slot for device in self.slots for slot in device)

    def occupied(self) -> int:
        return sum(slot is not None for device in self.slots for slot in device)


class Aggregator:
    """Plans ticks for single-prompt jobs; owned by the device loop's thread.

    Args:
        lanes: the resolutions that have programs.
        num_devices: devices, each with `slots_per_device` slots in every lane.
        slots_per_device: rows of one device's batch.
        tick_s: how long a tick should take, seconds.
    """

    def __init__(self, lanes: Sequence[Lane], num_devices: int, slots_per_device: int, tick_s: float) -> None:
        self.num_devices, self.slots_per_device, self.tick_s = num_devices, slots_per_device, tick_s
        self._lanes = {
            lane: _LaneState(slots=[[None] * slots_per_device for _ in range(num_devices)]) for lane in lanes
        }
        self._turn = deque(lanes)
        self._step_s: dict[Lane, float] = dict.fromkeys(lanes, tick_s)

    def add(self, task_id: str, lane: Lane, num_steps: int) -> None:
        """Queue a job behind those that came before it."""
        if any(task_id in state.waiting or self._find(state, task_id) for state in self._lanes.values()):
            raise ValueError(f"task {task_id} is already here")
        self._lanes[lane].waiting[task_id] = num_steps

    def cancel(self, task_id: str) -> bool:
        """Drop a job, waiting or running; its slot is free in the next plan. False if it is not here any more."""
        for state in self._lanes.values():
            if state.waiting.pop(task_id, None) is not None:
                return True
            place = self._find(state, task_id)
            if place is not None:
                device, slot = place
                state.slots[device][slot] = None
                return True
        return False

    def plan(self) -> Plan | None:
        """Return the next tick, or None when there is nothing to do. Lanes with work take turns."""
        for _ in range(len(self._turn)):
            lane = self._turn[0]
            self._turn.rotate(-1)
            if self._lanes[lane].has_work():
                return self._plan_lane(lane)
        return None

    def update(self, outcome: Outcome) -> None:
        """Learn what a step costs, so that ticks take about `tick_s`."""
        steps = max(device.steps for device in outcome.plan.devices)
        if steps and not any(device.insert or device.decode for device in outcome.plan.devices):
            self.observe_step(outcome.plan.lane, outcome.elapsed_s / steps)

    def observe_step(self, lane: Lane, step_s: float) -> None:
        """Take in one measurement of a step's seconds in a lane; recent ones count most."""
        known = self._step_s[lane]
        self._step_s[lane] = step_s if known == self.tick_s else 0.8 * known + 0.2 * step_s

    def steps_per_tick(self, lane: Lane) -> int:
        """Return how many steps fill a tick."""
        return max(1, round(self.tick_s / max(self._step_s[lane], 1e-6)))

    def counts(self) -> Mapping[str, int]:
        """Return how many jobs wait and how many have a slot."""
        return {
            "waiting": sum(len(state.waiting) for state in self._lanes.values()),
            "running": sum(state.occupied() for state in self._lanes.values()),
        }

    def _plan_lane(self, lane: Lane) -> Plan:
        state = self._lanes[lane]
        inserts: dict[int, tuple[int, str]] = {}
        # Emptiest device first, so that jobs spread over devices before they share one.
        for device in sorted(range(self.num_devices), key=lambda d: sum(s is not None for s in state.slots[d])):
            slots = state.slots[device]
            if state.waiting and None in slots:
                task_id, num_steps = state.waiting.popitem(last=False)
                slot = slots.index(None)
                slots[slot] = _Slot(task_id, num_steps)
                inserts[device] = slot, task_id
        occupied = state.occupied()
        most = self.steps_per_tick(lane)
        return Plan(
            lane,
            tuple(self._instruct(state.slots[d], inserts.get(d), most) for d in range(self.num_devices)),
            occupied,
        )

    @staticmethod
    def _instruct(slots: list[_Slot | None], insert: tuple[int, str] | None, most: int) -> DeviceInstruction:
        """Advance to the first job that gets done, at most a tick's steps, and decode one that is done."""
        running = [slot.remaining for slot in slots if slot and slot.remaining]
        steps = min([most, *running]) if running else 0
        decode = None
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            slot.remaining -= min(steps, slot.remaining)
            if slot.remaining == 0 and decode is None:
                decode = i, slot.task_id
        if decode:
            slots[decode[0]] = None
        return DeviceInstruction(insert, steps, decode)

    @staticmethod
    def _find(state: _LaneState, task_id: str) -> tuple[int, int] | None:
        for device, slots in enumerate(state.slots):
            for i, slot in enumerate(slots):
                if slot and slot.task_id == task_id:
                    return device, i
        return None
