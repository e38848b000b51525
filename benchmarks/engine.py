"""What a tick costs, by how many devices are busy: is a device with nothing to do free?

    python benchmarks/engine.py [--model embedded] [--slots-per-device 1] [--repeats 9]

Needs `pip install -e '.[worker]'`. Takes about a minute with the shipped checkpoint on two CPU cores, where eight
devices are simulated: there, half of the devices should cost about half of the time, none almost nothing. On real
devices the time of a tick should not depend on how many are busy. Prints medians in ms, all from one run.
"""

from __future__ import annotations

import argparse
import statistics
import time

from sdtpu_worker import GenerationRequest
from sdtpu_worker.aggregator.plan import DeviceInstruction, Plan
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine, choose_dtype
from sdtpu_worker.diffusion.sharding import find_devices

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--slots-per-device", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    devices = find_devices("auto", 8)
    dtype = choose_dtype("auto", devices[0].platform)
    engine = Engine(load_checkpoint(args.model, dtype), devices, args.slots_per_device)
    lane = engine.resolutions[0]
    job = engine.prepare("job", GenerationRequest("a red circle", seed=0, num_inference_steps=1000))
    count = engine.num_devices

    def tick_ms(busy: int, **instruction: object) -> float:
        plan = Plan(
            lane, tuple(DeviceInstruction(**instruction) if i < busy else DeviceInstruction() for i in range(count)), 0
        )
        times = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            engine.execute(plan, {"job": job}).wait()
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    tick_ms(count, insert=(0, "job"))
    print(f"{count} devices of kind {engine.device_kind}, {args.slots_per_device} slots each, {dtype.__name__}, ms")
    print(f"{'devices busy':<14}{'insert':>9}{f'{STEPS} steps':>10}{'decode':>9}")
    for busy in dict.fromkeys((count, count // 2, count // 4, 1, 0)):
        costs = (
            tick_ms(busy, insert=(0, "job")),
            tick_ms(busy, steps=STEPS),
            tick_ms(busy, decode=(0, "job")),
        )
        print(f"{busy:<14}{costs[0]:>9.1f}{costs[1]:>10.1f}{costs[2]:>9.1f}")


if __name__ == "__main__":
    main()
