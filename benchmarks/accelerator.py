"""Measure this host's accelerator in at most twelve minutes; without one, rehearse on simulated devices.

    pip install -e '.[gpu,bench]' && python benchmarks/accelerator.py --model sd15      # NVIDIA GPUs
    pip install -e '.[tpu,bench]' && python benchmarks/accelerator.py --model sd15      # a TPU host
    python benchmarks/accelerator.py --minutes 3                                        # a rehearsal

No network. `--model` is a name (`sd15`, `sd21`, `sdxl`: random weights with the real configs, written to a temporary
folder first), a folder in the diffusers layout, or `embedded`. The parts run one after the other, each in a process of
its own that leaves the devices free, the most important first:

1. the engine with 4 slots per device: compile time, a step, a decode, an insert, the host's work for a tick, and jobs
   that are all there at once in the device loop (images per second, occupancy);
2. diffusers in PyTorch where `--torch-python` has torch, with the same checkpoint, steps, batch and dtype, on one
   device (`accelerator_diffusers.py` says with which settings);
3. a real worker with a real Redis and all jobs there at once;
4. the engine and diffusers with 1, 8 and 2 slots.

A part that would not fit into what is left of `--minutes` is left out, and one that takes too long is ended; both are
said. The file `--out` is whole after each part, so that a run which is cut leaves what it measured. Prints a table:
median, least and most, number of runs, unit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accelerator_figures import replace_whole
from benchmarks.accelerator_table import LOUD, to_text
from sdtpu_worker.testing.processes import running

ROOT = Path(__file__).parent.parent
NAMES = ("sd15", "sd21", "sdxl")
_LEAST_S, _SPARE_S = 45.0, 8.0
_PROBE = """
import json, sys
from sdtpu_worker.diffusion.memory import memory_of
from sdtpu_worker.diffusion.sharding import find_devices
devices = find_devices(sys.argv[1], 8)
import importlib.metadata as installed
versions = {d.metadata["Name"].lower(): d.version for d in installed.distributions()}
wanted = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12")
print(json.dumps({"platform": devices[0].platform, "device_kind": devices[0].device_kind, "num_devices": len(devices),
    "runtime": devices[0].client.platform_version, "memory_bytes": memory_of(devices[0]),
    "versions": {name: versions[name] for name in wanted if name in versions}}))
"""


@dataclass(frozen=True)
class Part:
    """One process that measures.

    Attributes:
        kind: `engine`, `diffusers` or `worker`.
        slots: of a device; diffusers' batch.
        share: of all the time that there is, which it may take at most.
        options: further ones of its script.
    """

    kind: str
    slots: int
    share: float
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the table and the file have it."""
        return f"{self.kind}, {self.slots} slot{'' if self.slots == 1 else 's'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code: 1 where nothing could be measured."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the parts end too
    started = time.monotonic()
    until = started + 60 * args.minutes
    about = probe(args.platform)
    is_rehearsal = about["platform"] == "cpu"
    model = args.model or ("embedded" if is_rehearsal else "sd15")
    done: list[dict[str, Any]] = []
    about |= {"rehearsal": is_rehearsal, "model": model, "date": time.strftime("%Y-%m-%d"), "steps": args.steps}
    about |= {"python": platform.python_version(), "minutes": args.minutes}
    found = {"about": about, "parts": done}
    print(f"{about['num_devices']} devices of kind {about['device_kind']} ({about['platform']}), model {model}")
    if is_rehearsal:
        print(LOUD, flush=True)
    with tempfile.TemporaryDirectory(prefix="sdtpu-accelerator-", dir=args.scratch) as scratch:
        folder = make_checkpoint(model, Path(scratch))
        for part in parts(args, has_torch(args.torch_python), is_rehearsal):
            if reason := why_not(part, done, until - time.monotonic()):
                measured: dict[str, Any] = {"name": part.name, "status": "left out", "reason": reason, "figures": []}
            else:
                limit = min(until - time.monotonic() - _SPARE_S, 60 * args.minutes * part.share)
                print(f"{part.name}: at most {limit:.0f} s …", flush=True)
                measured = run(part, args, folder, about, Path(scratch), limit)
            done.append({"kind": part.kind, "slots": part.slots, **measured})
            replace_whole(args.out, {**found, "wall_s": round(time.monotonic() - started, 1)})
    print(to_text(found))
    print(f"{time.monotonic() - started:.0f} s; {args.out} has all of it")
    return 0 if any(part["figures"] for part in done) else 1


def probe(wanted: str) -> dict[str, Any]:
    """Return what devices there are, asked in a process that leaves them free."""
    command = [sys.executable, "-c", _PROBE, wanted]
    run = subprocess.run(command, env=_env(), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"no devices: {(run.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    about: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return about


def make_checkpoint(model: str, scratch: Path) -> str:
    """Return what `sdtpu_model` is for the parts; of a known name it writes random weights."""
    if model not in NAMES:
        return model
    from benchmarks.accelerator_checkpoint import write_checkpoint

    folder = scratch / model
    write_checkpoint(model, folder)
    return str(folder)


def parts(args: argparse.Namespace, with_torch: bool, is_rehearsal: bool) -> list[Part]:
    """Return what to measure, the most important first."""
    first, *others = args.slots
    compiled = () if is_rehearsal or args.torch_compile == "off" else ("--compile", args.torch_compile)
    found = [
        Part("engine", first, 0.5, ("--loop",)),
        Part("diffusers", first, 0.3, compiled),
        Part("worker", first, 0.25),
    ]
    for slots in others:
        found += [Part("engine", slots, 0.3), Part("diffusers", slots, 0.15)]
    return [part for part in found if with_torch or part.kind != "diffusers"]


def why_not(part: Part, done: Sequence[dict[str, Any]], left_s: float) -> str:
    """Return why a part is left out; an empty text if it is not."""
    needed_s = _LEAST_S
    for each in done:
        if each["kind"] == part.kind and each["figures"]:
            needed_s = max(needed_s, 20 + sum(figure["median"] for figure in each["figures"] if figure["unit"] == "s"))
        if each["kind"] == part.kind and "out of memory" in each.get("reason", "") and each["slots"] < part.slots:
            return f"{each['slots']} slots had no room"
    return f"needs about {needed_s:.0f} s, and {max(0, left_s):.0f} s are left" if left_s < needed_s + _SPARE_S else ""


def run(
    part: Part, args: argparse.Namespace, model: str, about: dict[str, Any], scratch: Path, limit_s: float
) -> dict[str, Any]:
    """Run a part for as long as it may, and return what it measured, also of one that was ended or failed."""
    out, log = scratch / "part.json", scratch / "part.log"
    out.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    script = str(ROOT / "benchmarks" / f"accelerator_{part.kind}.py")
    common = ["--out", str(out), "--seconds", f"{limit_s - 5:.0f}", "--steps", str(args.steps), *part.options]
    if part.kind == "diffusers":
        dtype = "float32" if about["platform"] == "cpu" else "bfloat16"
        folder = str(ROOT / "sdtpu_worker" / "checkpoint") if model == "embedded" else model
        command = [args.torch_python, script, "--model", folder, "--batch", str(part.slots), "--dtype", dtype, *common]
    else:
        simulated = "8" if model.startswith("embedded") else "1"  # eight copies of a real model would not fit
        where = ["--platform", args.platform, "--cpu-devices", simulated, "--compile-cache", str(scratch / "programs")]
        command = [sys.executable, script, "--model", model, "--slots", str(part.slots), *where, *common]
    started = time.monotonic()
    status = "ended"
    with running(command, log, _env(), grace_s=15) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = "done" if process.wait(limit_s) == 0 else "failed"
    found = json.loads(out.read_text()) if out.is_file() else {"figures": []}
    reason = {"done": "", "ended": f"its {limit_s:.0f} s were over", "failed": _last_line(log)}[status]
    return {
        "name": part.name,
        "status": status,
        "reason": reason,
        "wall_s": round(time.monotonic() - started, 1),
        **found,
    }


def has_torch(python: str) -> bool:
    """Return whether an interpreter has torch and diffusers."""
    code = "import importlib.util as i, sys; sys.exit(not (i.find_spec('torch') and i.find_spec('diffusers')))"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _env() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "Error" in line or "RESOURCE_EXHAUSTED" in line), "")
    said = found or (lines[-1] if lines else "it said nothing")
    return f"{said.strip():.400}" + (" (out of memory)" if "RESOURCE_EXHAUSTED" in said else "")


def _slots(text: str) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(int(each) for each in text.split(",")))
    if not found or not all(1 <= each <= 64 for each in found):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 to 64 like 4,1,8,2, got {text!r}")
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"{', '.join(NAMES)}, a folder, or embedded (sd15; embedded on the CPU)")
    parser.add_argument("--minutes", type=float, default=12.0, help="that all may take at most (12)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a job (20)")
    parser.add_argument("--slots", type=_slots, default=(4, 1, 8, 2), help="slots per device, in this order (4,1,8,2)")
    parser.add_argument("--platform", choices=["auto", "tpu", "gpu", "cpu"], default="auto")
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        help="with torch and diffusers (this one)",
    )
    parser.add_argument("--torch-compile", default="reduce-overhead", help="mode of torch.compile, or off")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), help="file (accelerator.json)")
    parser.add_argument("--scratch", type=Path, help="folder for weights and programs (the system's)")
    args = parser.parse_args(argv)
    if not 0.5 <= args.minutes <= 600:
        parser.error(f"--minutes must be from 0.5 to 600, got {args.minutes:g}")
    if args.model and args.model not in (*NAMES, "embedded", "embedded-turbo") and not Path(args.model).is_dir():
        parser.error(f"--model must be one of {', '.join(NAMES)}, embedded, or a folder, got {args.model!r}")
    return args


if __name__ == "__main__":
    sys.exit(main())
