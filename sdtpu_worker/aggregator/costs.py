"""What the devices' work costs in seconds: measured when the engine starts, corrected by every tick. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from sdtpu_worker.aggregator.plan import Phase, Plan

_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Cost:
    """Seconds on one device.

    Attributes:
        step_s: of a denoising step of all its slots.
        insert_s: of an insert with its text encoder.
        decode_s: of a decode.
        picture_s: of each picture that an insert encodes besides.
        control_s: of each ControlNet, for a step in which a slot of the device asks it.
        adapter_s: of the transfer of a job's LoRAs, before its insert.
        window_s: of each further window of the longest prompt on the device, for a step.
        window_insert_s: of each further window that an insert encodes.
    """

    step_s: float
    insert_s: float = 0.0
    decode_s: float = 0.0
    picture_s: float = 0.0
    control_s: tuple[float, ...] = ()
    adapter_s: float = 0.0
    window_s: float = 0.0
    window_insert_s: float = 0.0

    def insert_of(self, pictures: int, adapters: int = 0, windows: int = 0) -> float:
        """Return the seconds of an insert with pictures and further windows, and LoRAs that are sent first."""
        return self.insert_s + pictures * self.picture_s + adapters * self.adapter_s + windows * self.window_insert_s

    def step_of(self, controls: Iterable[int], windows: int = 0) -> float:
        """Return the seconds of a step in which these ControlNets are asked and so many further windows seen."""
        return self.step_s + sum(self.control_s[i] for i in set(controls)) + windows * self.window_s

    def of(self, phases: Iterable[Phase]) -> float:
        """Return the seconds that one device needs for phases."""
        return sum(
            phase.steps * self.step_of(phase.controls, phase.windows)
            + (phase.insert is not None) * self.insert_of(phase.pictures, phase.adapters, phase.windows_in)
            + (phase.decode is not None) * self.decode_s
            for phase in phases
        )


class TickCosts:
    """The costs of one lane's ticks.

    A tick lasts as long as its busiest device. Real devices do not slow each other down. Simulated devices share the
    cores of a CPU, so `slowdown` says how many times longer all work takes while a number of devices is busy.

    Args:
        num_devices: how many devices the host has.
        cost: what work costs on a device while no other device is busy.
        slowdown: factors by number of busy devices; numbers between those given are interpolated.
        overhead_s: how long a tick takes in which no device has anything to do.
    """

    def __init__(
        self, num_devices: int, cost: Cost, slowdown: Mapping[int, float] | None = None, overhead_s: float = 0.0
    ) -> None:
        self.num_devices, self.cost, self.overhead_s = num_devices, cost, overhead_s
        given = {1: 1.0, **(slowdown or {})}
        self._slowdown = [_interpolate(given, busy) for busy in range(1, num_devices + 1)]

    def slowdown(self, busy: int) -> float:
        """Return how many times longer work takes while `busy` devices are busy than on one alone."""
        return self._slowdown[min(max(busy, 1), self.num_devices) - 1]

    def step_s(self, busy: int) -> float:
        """Return the seconds of a step while `busy` devices are busy."""
        return self.cost.step_s * self.slowdown(busy)

    def tick_s(self, plan: Plan) -> float:
        """Return the seconds that a tick is expected to take."""
        return self.overhead_s + sum(seconds for _, seconds in self._parts(plan))

    def learn(self, plan: Plan, elapsed_s: float) -> None:
        """Correct the slowdowns that a tick went through, each in proportion to its share of the tick."""
        parts = list(self._parts(plan))
        expected_s = self.overhead_s + sum(seconds for _, seconds in parts)
        if expected_s <= 0:
            return
        error = min(max(elapsed_s / expected_s, 0.5), 2.0) - 1
        for busy, seconds in parts:
            self._slowdown[busy - 1] *= 1 + _LEARNING_RATE * error * seconds / expected_s

    def to_json(self) -> dict[str, float | list[float]]:
        """Return the costs in seconds, and the slowdown for 1, 2, … busy devices."""
        costs: dict[str, float | list[float]] = {
            each.name: round(getattr(self.cost, each.name), 6) for each in fields(Cost) if each.name != "control_s"
        }
        costs["control_s"] = [round(seconds, 6) for seconds in self.cost.control_s]
        slowdown = [round(factor, 3) for factor in self._slowdown]
        return {**costs, "overhead_s": round(self.overhead_s, 6), "slowdown": slowdown}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> TickCosts:
        """Rebuild costs from what `to_json` returned."""
        facts: dict = dict(data)
        slowdown = dict(enumerate(facts.pop("slowdown"), start=1))
        overhead_s = facts.pop("overhead_s")
        facts["control_s"] = tuple(facts.get("control_s", ()))
        return cls(len(slowdown), Cost(**facts), slowdown, overhead_s)

    def _parts(self, plan: Plan) -> Iterator[tuple[int, float]]:
        """Yield `(devices busy, seconds)` of a tick: first for all devices that work in it, at last for the busiest."""
        works = sorted(self.cost.of(phases) for phases in plan.devices if phases)
        done = 0.0
        for i, work in enumerate(works):
            if work > done:
                busy = len(works) - i
                yield busy, (work - done) * self.slowdown(busy)
                done = work


def _interpolate(given: Mapping[int, float], busy: int) -> float:
    below = max((n for n in given if n <= busy), default=min(given))
    above = min((n for n in given if n >= busy), default=max(given))
    share = (busy - below) / (above - below) if above > below else 0.0
    return given[below] + share * (given[above] - given[below])
