"""A part of `accelerator.py`: one slot count of the engine, in a process of its own that ends with the devices free.

    python benchmarks/accelerator_engine.py --model MODEL --slots 4 --out FILE --seconds 240

Measures, most important first: start and compile, a step, a decode, an insert, the host's work for a tick, and jobs
that are all there at once in the device loop. `--out` is whole after each figure. Times of the devices have the time
of a tick without work taken off.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator_figures import Report, part_parser, peak_flops, repeat
from benchmarks.saturated_loop import run_all
from sdtpu_worker import GenerationRequest
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.diffusion.ahead_of_time import count_parts
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.diffusion.start import choose_dtype, make_warm_engine

STEPS = 10
MIX = (10, 20, 30, 50)
_RUNS, _SHARE_OF_LOOP = 15, 0.3
_FACTS = (
    "model", "dtype", "platform", "device_kind", "num_devices", "slots_per_device", "phases_per_tick", "resolutions",
    "kept_programs", "cache_hits", "cache_misses",
)  # fmt: skip


def main() -> None:
    """Measure one slot count."""
    parser = part_parser(__doc__, compile_cache="off")
    parser.add_argument("--loop", action="store_true", help="also measure jobs that are all there at once")
    args = parser.parse_args()
    started = time.monotonic()
    report = Report(args.out, slots_per_device=args.slots)
    devices = find_devices(args.platform, args.cpu_devices)
    engine = start(report, args.model, args.slots, devices, args.compile_cache)
    until = started + args.seconds
    Bench(engine, report, until).measure()
    if args.loop:
        for name, mix in ((f"all of {args.steps} steps", (args.steps,)), (f"of {MIX} steps", MIX)):
            saturate(engine, report, name, mix, _SHARE_OF_LOOP * (until - time.monotonic()))
    engine.close()


def start(report: Report, model: str, slots: int, devices: list[jax.Device], compile_cache: str) -> Engine:
    """Return an engine as a worker starts it, and say what the parts of its start took."""
    begun = time.monotonic()
    dtype = choose_dtype("auto", devices[0].platform)
    checkpoint = load_checkpoint(model, dtype)
    report.add("load the checkpoint", [time.monotonic() - begun], "s")
    loaded = time.monotonic()
    engine = make_warm_engine(checkpoint, devices, slots, compile_cache=CompileCache(compile_cache))
    info = engine.info
    report.say(**{name: getattr(info, name) for name in _FACTS})
    report.add("trace the programs", [info.trace_s], "s")
    report.add("compile the programs", [info.compile_s], "s", cache_hits=info.cache_hits, kept=info.kept_programs)
    rest = time.monotonic() - loaded - info.trace_s - info.compile_s - info.load_s
    report.add("send parameters, run every program", [rest], "s")
    return engine


class Bench:
    """Measures the tick of an engine's first resolution, with every device at work.

    Args:
        engine: warm; nothing else uses it.
        report: for the figures.
        until: `time.monotonic()` after which runs are few.
    """

    def __init__(self, engine: Engine, report: Report, until: float) -> None:
        self.engine, self.report, self.until = engine, report, until
        self.lane, self.count = engine.info.resolutions[0], engine.info.num_devices
        request = GenerationRequest("a red circle", seed=0, num_inference_steps=1000, sampler="ddim")
        self.job = engine.prepare("job", request)

    def measure(self) -> None:
        """Measure everything."""
        slots, report = self.engine.info.slots_per_device, self.report
        for slot in range(slots):
            self._tick_s(Phase(insert=(slot, "job")))
        empty = self._runs(lambda: self._tick_s(None))
        empty_s = report.add("a tick without work, from call to end", [1000 * each for each in empty], "ms") / 1000
        long = Phase(steps=STEPS)
        self._tick_s(long)

        def step_ms() -> float:
            return 1000 * (self._tick_s(long) - empty_s) / STEPS

        steps = self._runs(step_ms)
        step = report.add("a step of all slots", steps, "ms of a device")
        report.add("a step of one image", [each / slots for each in steps], "ms of a device", **self._share(step))
        decode = [1000 * (each - empty_s) for each in self._runs(lambda: self._tick_s(Phase(decode=(0, "job"))))]
        report.add("a decode", decode, "ms of a device an image")
        self._measure_inserts(empty_s)
        self._measure_host()
        report.say(memory_bytes={str(device): facts for device, facts in self.engine.memory().items()})

    def _measure_inserts(self, empty_s: float) -> None:
        insert = Phase(insert=(0, "job"))
        times = self._runs(lambda: self._tick_s(insert))
        self.report.add("an insert (text encoders)", [1000 * (each - empty_s) for each in times], "ms of a device")
        if self.engine.checkpoint.family.picture_use is not PictureUse.START:
            return
        grey = np.full((*self.lane, 3), 127, np.uint8)
        with_picture = dataclasses.replace(self.job, image=grey, first_level=(0.5, 0.5))
        times = self._runs(lambda: self._tick_s(insert, with_picture))
        self.report.add(
            "an insert from a picture (text and image encoders)",
            [1000 * (each - empty_s) for each in times],
            "ms of a device",
        )

    def _measure_host(self) -> None:
        """Measure what the host does until a tick is on its way, and how close two ticks without work follow."""
        dispatches = list[float]()

        def dispatch() -> float:
            started = time.perf_counter()
            tick = self.engine.execute(self._plan(Phase(steps=1)), {"job": self.job})
            dispatches.append(1000 * (time.perf_counter() - started))
            tick.wait()
            return dispatches[-1]

        self._runs(dispatch)
        self.report.add("the host's work to dispatch a tick", dispatches[1:], "ms of the host")

        def follow() -> float:
            started, ticks = time.perf_counter(), [self.engine.execute(self._plan(None), {})]
            for _ in range(8):
                ticks.append(self.engine.execute(self._plan(None), {}))
                ticks.pop(0).wait()
            ticks.pop().wait()
            return 1000 * (time.perf_counter() - started) / 9

        self.report.add("a tick without work, with another in flight", self._runs(follow), "ms")

    def _share(self, step_ms: float) -> dict[str, Any]:
        """Return the FLOPs of an image's step, and the share of the peak where that is known."""
        engine = self.engine
        family, info = engine.checkpoint.family, engine.info
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), engine.checkpoint.params)
        geometry = Geometry.of(family, self.count, info.slots_per_device, self.lane)
        flops = sum(2 * m * k * n * times for m, k, n, times in count_parts(family, shapes, geometry)["step"])
        peak = peak_flops(info.device_kind, info.dtype)
        share = None if peak is None else round(flops / (step_ms / 1000) / peak, 4)
        return {"gflop": round(flops / info.slots_per_device / 1e9, 2), "share_of_peak": share, "peak_flops": peak}

    def _plan(self, phase: Phase | None) -> Plan:
        return Plan(self.lane, (() if phase is None else (phase,),) * self.count)

    def _tick_s(self, phase: Phase | None, job: PreparedJob | None = None) -> float:
        started = time.perf_counter()
        self.engine.execute(self._plan(phase), {"job": job or self.job}).wait()
        return time.perf_counter() - started

    def _runs(self, run: Callable[[], float]) -> list[float]:
        run()  # the first is not counted
        return repeat(run, _RUNS, min(self.until, time.monotonic() + 20))


class TimedPolicy(Aggregator):
    """The policy of a worker, which notes how long its plans take."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans_ms: list[float] = []

    def plan(self, now: float, most_s: float = math.inf) -> Plan | None:
        """See `Aggregator.plan`."""
        started = time.perf_counter()
        plan = super().plan(now, most_s)
        self.plans_ms.append(1000 * (time.perf_counter() - started))
        return plan


def saturate(engine: Engine, report: Report, name: str, mix: Sequence[int], seconds: float) -> None:
    """Measure jobs that are all there at once, in the device loop without Celery and Redis.

    Args:
        engine: warm.
        report: for the figures.
        name: of the jobs.
        mix: their steps, in turn.
        seconds: about as long may it take.
    """
    info = engine.info
    lane, slots = info.resolutions[0], info.num_devices * info.slots_per_device
    cost, mean = engine.costs[lane].cost, sum(mix) / len(mix)
    life_s = mean * engine.costs[lane].step_s(info.num_devices) + info.slots_per_device * (
        cost.insert_s + cost.decode_s
    )
    rounds = int(min(8, max(2, seconds / life_s)))
    jobs = [
        engine.prepare(
            str(i), GenerationRequest("a red circle", seed=i, num_inference_steps=mix[i % len(mix)], sampler="ddim")
        )
        for i in range(rounds * slots)
    ]
    policy = TimedPolicy(engine.costs, info.slots_per_device, info.phases_per_tick, tick_s=0.1)
    elapsed_s, stats = run_all(engine, policy, jobs)
    what = {"jobs": len(jobs), "of": f"jobs {name}, in the device loop", "steps": list(mix)}
    report.add("images", [len(jobs) / elapsed_s], "images/s of all devices", **what)
    report.add("occupancy", [stats.occupied_slot_s / slots / elapsed_s], "share of all slots", **what)
    report.add("the host's work to plan a tick", policy.plans_ms, "ms of the host", **what)


if __name__ == "__main__":
    main()
