"""What a tick costs, by how many devices are busy: is a device with nothing to do free?

    python benchmarks/engine.py [--model embedded] [--slots-per-device 1] [--repeats 9] [--json costs.json]

Needs `pip install -e '.[worker]'`. Takes about a minute with the shipped checkpoint on two CPU cores, where eight
devices are simulated: there, half of the devices should cost about half of the time, none almost nothing. On real
devices the time of a tick should not depend on how many are busy. Prints medians in ms, all from one run; `--json`
keeps them as the costs that `benchmarks/simulate.py` reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from sdtpu_worker import GenerationRequest
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.start import choose_dtype

STEPS = 10
INSERT, ADVANCE, DECODE = Phase(insert=(0, "job")), Phase(steps=STEPS), Phase(decode=(0, "job"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--slots-per-device", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    devices = find_devices("auto", 8)
    dtype = choose_dtype("auto", devices[0].platform)
    engine = Engine(load_checkpoint(args.model, dtype), devices, args.slots_per_device)
    info = engine.info
    print(f"{info.num_devices} devices of kind {info.device_kind}, {info.slots_per_device} slots each, {info.dtype}")
    costs = measure(engine, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(costs.to_json(), indent=1) + "\n")


def measure(engine: Engine, repeats: int) -> TickCosts:
    """Measure the first resolution's tick, print a table, return the costs."""
    lane, count = engine.info.resolutions[0], engine.info.num_devices
    job = engine.prepare("job", GenerationRequest("a red circle", seed=0, num_inference_steps=1000))

    def tick_ms(busy: int, phase: Phase) -> float:
        plan = Plan(lane, ((phase,),) * busy + ((),) * (count - busy))
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            engine.execute(plan, {"job": job}).wait()
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    for phase in (INSERT, ADVANCE, DECODE):
        tick_ms(count, phase)
    print(f"{'devices busy':<14}{'insert':>9}{f'{STEPS} steps':>10}{'decode':>9}")
    table = {}
    for busy in range(count, -1, -1):
        table[busy] = [tick_ms(busy, phase) for phase in (INSERT, ADVANCE, DECODE)]
        print(f"{busy:<14}" + "{:>9.1f}{:>10.1f}{:>9.1f}".format(*table[busy]))
    overhead_ms = min(table[0])
    insert_s, steps_s, decode_s = (max(1e-6, (ms - overhead_ms) / 1000) for ms in table[1])
    slowdown = {busy: max(1.0, (table[busy][1] - overhead_ms) / 1000 / steps_s) for busy in range(1, count + 1)}
    return TickCosts(count, Cost(steps_s / STEPS, insert_s, decode_s), slowdown, overhead_ms / 1000)


if __name__ == "__main__":
    main()
