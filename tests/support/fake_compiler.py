"""Stands in for `sdtpu_worker.diffusion.ahead_of_time`: writes what a compiler writes, as the model's name says."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

TICK = (Path(__file__).parent.parent / "unit" / "hlo" / "tick.txt").read_text()
REPORT = "Memory Space: default (color=0)\nTotal bytes: 100000 (97KiB)\n"
MEMORY = {"argument": 70_000, "output": 5_000, "alias": 4_000, "temp": 9_000, "generated_code": 300}


def main(folder: Path, mode: str) -> int:
    if mode == "crash":
        print("first line\nRuntimeError: it went wrong", file=sys.stderr)
        return 1
    if mode == "wrong":
        print("--model must be another", file=sys.stderr)
        return 3
    if mode == "hungry":
        held = bytearray(os.urandom(1) * 300_000_000)
        time.sleep(60)
        return len(held)
    (folder / "facts.json").write_text(json.dumps({"donated": 2, "kernels": {}}))
    if mode == "no room":
        print("RESOURCE_EXHAUSTED: 18G of 15.75G", file=sys.stderr)
        return 4
    if mode == "slow":
        time.sleep(60)
    dump = Path(re.findall(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[0])
    dump.mkdir()
    name = "module_0007.jit_local_tick.cl_1.after_optimizations"
    (dump / f"{name}.txt").write_text(TICK)
    report = dump / f"{name}-memory-usage-report.txt"
    report.write_text("")
    time.sleep(1)  # a busy machine writes slowly
    report.write_text(REPORT)
    if mode == "whole":
        (folder / "tick.hlo").write_text(TICK)
        (folder / "tick.json").write_text(json.dumps({"memory": MEMORY}))
        return 0
    time.sleep(60)  # generating code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])["model"]))
