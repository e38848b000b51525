"""What the policy hands to the engine: plans are data. Pure: no clock, no threads, no arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Lane = tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """A part of one device's tick, done in this order.

    Attributes:
        decode: `(slot, task_id)` of a job that is done, or None; its slot is free afterwards.
        insert: `(slot, task_id)` of a job that starts, or None.
        steps: denoising steps for the device's slots; slots that are done keep their values.
    """

    decode: tuple[int, str] | None = None
    insert: tuple[int, str] | None = None
    steps: int = 0


@dataclass(frozen=True)
class Place:
    """A job in a slot of a device."""

    task_id: str
    device: int
    slot: int


@dataclass(frozen=True)
class Plan:
    """One tick of one lane.

    Attributes:
        lane: the resolution, `(height, width)`.
        devices: every device's phases; none for a device that has nothing to do.
        parked: jobs whose state leaves its slot before the first phase, at most one on a device.
        resumed: jobs whose state comes back after that, before the first phase, at most one on a device.
        previews: jobs whose latents are wanted as a small picture after the last phase, at most one on a device.
        occupied: slots of the lane that hold a job at some time of the tick.
        steps_done: by task id, the steps that a job has taken when the tick is over.
        work_s: every device's expected seconds of work.
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

    def inserted(self) -> Iterator[str]:
        """Yield the tasks that start."""
        return (phase.insert[1] for phases in self.devices for phase in phases if phase.insert)

    def decoded(self) -> Iterator[tuple[int, int, int, str]]:
        """Yield `(device, phase, slot, task_id)` of every picture that the tick makes."""
        for device, phases in enumerate(self.devices):
            for i, phase in enumerate(phases):
                if phase.decode:
                    yield device, i, *phase.decode


@dataclass(frozen=True)
class Outcome:
    """What became of a plan: the seconds from its start on the devices to its end."""

    plan: Plan
    elapsed_s: float


def phases_per_tick(slots_per_device: int) -> int:
    """Return P: as many phases as slots can change hands in a tick, and one to go on; more than 4 do not pay."""
    return min(slots_per_device + 1, 4)


def one_of_each_device(places: Iterable[Place]) -> list[tuple[Place, ...]]:
    """Return the places in as few groups as possible that can each be parked by one plan."""
    groups: list[dict[int, Place]] = []
    for place in places:
        group = next((group for group in groups if place.device not in group), None)
        if group is None:
            groups.append(group := {})
        group[place.device] = place
    return [tuple(group.values()) for group in groups]
