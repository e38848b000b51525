"""What the policy hands to the engine: a plan for one tick, as data. Pure: no clock, no threads, no arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Lane = tuple[int, int]
"""A resolution, `(height, width)` in pixels, with its own compiled programs and its own slots on every device."""


@dataclass(frozen=True)
class Phase:
    """A part of one device's tick: first decode, then insert, then advance.

    Attributes:
        decode: `(slot, task_id)` of a job that has taken all of its steps, or None; its slot is free afterwards.
        insert: `(slot, task_id)` of a job that starts, or None.
        steps: denoising steps for the device's slots; a slot whose job has taken all of its steps keeps its values.
        pictures: how many pictures the insert encodes.
        controls: the ControlNets that the steps may ask.
        adapters: how many combinations of LoRAs are sent before the insert.
        windows: how many windows the longest prompt has besides the first, of those that the steps may attend to.
        windows_in: how many windows the insert encodes besides the first.
    """

    decode: tuple[int, str] | None = None
    insert: tuple[int, str] | None = None
    steps: int = 0
    pictures: int = 0
    controls: frozenset[int] = frozenset()
    adapters: int = 0
    windows: int = 0
    windows_in: int = 0


@dataclass(frozen=True)
class Place:
    """A job in a slot of a device."""

    task_id: str
    device: int
    slot: int


class PlannedDecode(NamedTuple):
    """One image that a tick decodes: the number of the phase on its device, and where the job is."""

    device: int
    phase: int
    slot: int
    task_id: str


@dataclass(frozen=True)
class Plan:
    """One tick of one lane.

    Attributes:
        lane: the resolution, `(height, width)`.
        devices: the phases of every device; an empty tuple for a device that has nothing to do.
        parked: jobs whose state leaves its slot before the first phase, at most one on a device.
        resumed: jobs whose state comes back into a slot after that, before the first phase, at most one on a device.
        previews: jobs whose latents are wanted as a small image after the last phase, at most one on a device.
        occupied: slots of the lane that hold a job at some time of the tick.
        steps_done: by task id, the steps that a job has taken when the tick is over.
        work_s: the expected seconds of work of every device.
    """

    lane: Lane
    devices: tuple[tuple[Phase, ...], ...]
    parked: tuple[Place, ...] = ()
    resumed: tuple[Place, ...] = ()
    previews: tuple[Place, ...] = ()
    occupied: int = 0
    steps_done: Mapping[str, int] = field(default_factory=dict)
    work_s: tuple[float, ...] = ()

    @property
    def busy(self) -> int:
        """How many devices have something to do."""
        return sum(bool(phases) for phases in self.devices)

    def inserted(self) -> tuple[str, ...]:
        """Return the task ids of the jobs that start in the tick."""
        return tuple(phase.insert[1] for phases in self.devices for phase in phases if phase.insert)

    def placed(self) -> dict[str, int]:
        """Return by task id the devices of the jobs that start or resume in the tick, the starting ones first."""
        inserted = ((phase.insert, d) for d, phases in enumerate(self.devices) for phase in phases)
        starting = {insert[1]: device for insert, device in inserted if insert}
        return starting | {place.task_id: place.device for place in self.resumed}

    def decoded(self) -> tuple[PlannedDecode, ...]:
        """Return every image that the tick decodes."""
        return tuple(
            PlannedDecode(device, i, *phase.decode)
            for device, phases in enumerate(self.devices)
            for i, phase in enumerate(phases)
            if phase.decode
        )


@dataclass(frozen=True)
class Outcome:
    """How long the devices took for a plan: the seconds from their start on it to its end."""

    plan: Plan
    elapsed_s: float


def phases_per_tick(slots_per_device: int) -> int:
    """Return P: as many phases as slots can change hands in a tick, and one more to advance; at most 4.

    More than 4 phases cost more in a longer program than they save.
    """
    return min(slots_per_device + 1, 4)


def one_of_each_device(places: Iterable[Place]) -> list[tuple[Place, ...]]:
    """Return the places in as few groups as possible that one plan each can park."""
    groups: list[dict[int, Place]] = []
    for place in places:
        group = next((group for group in groups if place.device not in group), None)
        if group is None:
            groups.append(group := {})
        group[place.device] = place
    return [tuple(group.values()) for group in groups]
