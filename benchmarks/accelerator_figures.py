"""What `accelerator.py` and its parts write and read: figures in a file that is whole after each, and chips' peaks."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PEAK_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""FLOP/s at most in bfloat16 without sparsity, by JAX's name of the device.

Sources: Google's pages of the TPU versions (cloud.google.com/tpu/docs), NVIDIA's data sheets of the GPUs (half of what
they give with sparsity). Of other devices no share is given.
"""


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the FLOP/s that a device reaches at most; None where that is not known."""
    return PEAK_BFLOAT16.get(device_kind) if dtype == "bfloat16" else None


class Report:
    """The figures of one part so far, in a file that is replaced after each.

    Args:
        path: of the file.
        facts: what the figures are of, as JSON.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self._path, self._facts, self._figures = path, facts, list[dict[str, Any]]()
        self._write()

    def add(self, name: str, values: Sequence[float], unit: str, **more: Any) -> float:
        """Add a figure.

        Args:
            name: what was measured.
            values: one for each run.
            unit: of the values.
            more: what else is to be said of it.

        Returns:
            The median.
        """
        median = statistics.median(values)
        figure = {"name": name, "median": median, "low": min(values), "high": max(values), "n": len(values)}
        self._figures.append({**{key: _rounded(value) for key, value in figure.items()}, "unit": unit, **more})
        self._write()
        return median

    def say(self, **facts: Any) -> None:
        """Add facts."""
        self._facts |= facts
        self._write()

    def _write(self) -> None:
        replace_whole(self._path, {**self._facts, "figures": self._figures})


def replace_whole(path: Path, data: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, and never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


def repeat(run: Callable[[], float], most: int, until: float, least: int = 1) -> list[float]:
    """Return what several runs return: as many as there may be until a time, but never fewer than the least.

    Args:
        run: measures once.
        most: how many runs at most.
        until: `time.monotonic()` after which no further one begins.
        least: how many runs in any case.
    """
    return list(_runs(run, most, until, least))


def _runs(run: Callable[[], float], most: int, until: float, least: int) -> Iterator[float]:
    for number in range(most):
        if number >= least and time.monotonic() > until:
            return
        yield run()


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def part_parser(about: str | None, compile_cache: str) -> argparse.ArgumentParser:
    """Return the options of a part that runs this package.

    Args:
        about: what the part does.
        compile_cache: the default of `--compile-cache`.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--platform", default="auto")
    parser.add_argument("--cpu-devices", type=int, default=8, help="to simulate where there is no accelerator (8)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--compile-cache", default=compile_cache)
    return parser
