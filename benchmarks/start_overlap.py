"""What it saves that weights are read while programs are loaded or compiled.

    python benchmarks/start_overlap.py [--read-s 4] [--rounds 3]

Needs `pip install -e '.[worker]'`; some minutes on two CPU cores. The shipped checkpoint, whose reading is made to take
some seconds, as gigabytes from a disk or a network do: its thread waits before each tensor. Prints medians in seconds
from the checkpoint's name to an engine with all programs, one after the other and overlapped, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import Checkpoint, open_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.loading_checkpoint import LoadingCheckpoint
from sdtpu_worker.diffusion.sharding import find_devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read-s", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    devices = find_devices("cpu", 2)

    def seconds(folder: str, overlapped: bool) -> float:
        started = time.monotonic()
        outline, read = open_checkpoint("embedded")
        pause_s = args.read_s / len(jax.tree.leaves(outline.params))

        def slowly(go_on: Callable[[], None]) -> Checkpoint:
            def wait() -> None:
                go_on()
                time.sleep(pause_s)

            return read(wait)

        with CompileCache(folder) as cache:
            reset_cache()  # JAX has one for the process
            if overlapped:
                with LoadingCheckpoint(outline, slowly) as loading:
                    Engine(loading, devices, compile_cache=cache).close()
            else:
                Engine(slowly(lambda: None), devices, compile_cache=cache).close()
        return time.monotonic() - started

    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(args.rounds):
        for overlapped in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                for kind in ("cold", "warm"):
                    times.setdefault((kind, overlapped), []).append(seconds(folder, overlapped))
    print(f"{'':<8}{'in turn':>9}{'overlapped':>12}")
    for kind in ("cold", "warm"):
        first, second = (statistics.median(times[kind, overlapped]) for overlapped in (False, True))
        print(f"{kind:<8}{first:>9.2f}{second:>12.2f}")


if __name__ == "__main__":
    main()
