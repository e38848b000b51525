"""Our workers on devices of constant speed.

BENCHMARK_STEP_S=0.025 celery -A benchmarks.serving_constant_speed:ours worker -Q sdtpu
BENCHMARK_STEP_S=0.025 celery -A benchmarks.serving_constant_speed:bucketed worker -Q sdtpu
BENCHMARK_STEP_S=0.025 celery -A benchmarks.serving_constant_speed:mixed worker -Q sdtpu

Simulated devices share the cores of a CPU: one that works alone is several times faster than one of eight, so a
batch of one costs a fraction of a full one, and whoever leaves devices idle is not punished. Real devices are not
like that. Here everything is still computed, but no tick ends before its busiest device would be done if a step took
it `BENCHMARK_STEP_S`, whatever the other devices do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from celery import Celery

from benchmarks.fixed_batches import BucketedPool, MixedPool, make_app
from benchmarks.fixed_policy import FixedBatches
from benchmarks.serving_systems import DECODE_STEPS, INSERT_STEPS
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.config import Config
from sdtpu_worker.device_loop.protocols import ExecutedTick, Image, Policy, ServingEngine, Snapshot
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.worker.pool import DevicePool, make_aggregator

if TYPE_CHECKING:
    import numpy as np

    from sdtpu_worker.diffusion.engine import Engine


@dataclass(frozen=True)
class HeldTick:
    """A dispatched tick whose images come out when its devices would be done."""

    tick: ExecutedTick
    ends_at: float

    @property
    def parked(self) -> Mapping[str, Snapshot]:
        return self.tick.parked

    @property
    def previews(self) -> Mapping[str, np.ndarray]:
        return self.tick.previews

    @property
    def done_at(self) -> float:
        return max(self.ends_at, self.tick.done_at or 0.0)

    def wait(self) -> Sequence[Image]:
        images = self.tick.wait()
        time.sleep(max(0.0, self.ends_at - time.monotonic()))
        return images


class ConstantSpeed:
    """Stands in for an engine's `execute`; a tick begins when the one before has ended.

    Args:
        execute: the engine's own.
        cost: of one device.
    """

    def __init__(self, execute: Callable[..., ExecutedTick], cost: Cost) -> None:
        self._execute, self._cost, self._free_at = execute, cost, 0.0

    def __call__(self, plan: Plan, *args: Any) -> HeldTick:
        tick = self._execute(plan, *args)
        self._free_at = max(self._free_at, time.monotonic()) + max(map(self._cost.of, plan.devices))
        return HeldTick(tick, self._free_at)


def hold_speed(engine: Engine) -> None:
    """Give every device of an engine the same speed, and tell its policy.

    Raises:
        ConfigurationError: the CPU is not that fast with all devices busy.
    """
    step_s = float(os.environ["BENCHMARK_STEP_S"])
    needed_s = max(costs.step_s(engine.info.num_devices) for costs in engine.costs.values())
    if needed_s > step_s:
        raise ConfigurationError(
            f"BENCHMARK_STEP_S must be at least what a step takes on this CPU while all devices are busy,"
            f" {needed_s:.4f} s just now, got {step_s}"
        )
    cost = Cost(step_s, INSERT_STEPS * step_s, DECODE_STEPS * step_s)
    costs_of_lanes = {lane: TickCosts(engine.info.num_devices, cost) for lane in engine.costs}
    engine.adopt(replace(engine.calibration, costs=costs_of_lanes))
    engine.execute = ConstantSpeed(engine.execute, cost)  # type: ignore[method-assign, assignment]  # a stand-in


class OurPoolAtConstantSpeed(DevicePool):
    @classmethod
    def make_policy(cls, engine: ServingEngine, config: Config) -> Policy:
        hold_speed(cast("Engine", engine))
        return make_aggregator(engine, config)


class BucketedPoolAtConstantSpeed(BucketedPool):
    @classmethod
    def make_policy(cls, engine: ServingEngine, config: Config) -> FixedBatches:
        hold_speed(cast("Engine", engine))
        return super().make_policy(engine, config)


class MixedPoolAtConstantSpeed(BucketedPoolAtConstantSpeed, MixedPool):
    pass


def _make_app(name: str, pool: type) -> Celery:
    app = make_app(name, pool)
    app.conf.worker_pool = f"{__name__}:{pool.__name__}"
    return app


if TYPE_CHECKING:
    _: type[ExecutedTick] = HeldTick  # mypy reports here what the stand-in lacks of the contract

ours = _make_app("ours", OurPoolAtConstantSpeed)
bucketed = _make_app("bucketed", BucketedPoolAtConstantSpeed)
mixed = _make_app("mixed", MixedPoolAtConstantSpeed)
