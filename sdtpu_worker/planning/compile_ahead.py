"""Compile programs for devices that are not here, in a child process that is watched and never outlives this one."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.errors import ConfigurationError, SdtpuError
from sdtpu_worker.planning.chips import GIB, Chip, parse_topology
from sdtpu_worker.planning.hlo import parse_module
from sdtpu_worker.planning.hlo_traffic import Traffic
from sdtpu_worker.planning.kernels import KernelCycles, dump_options, read_bundles
from sdtpu_worker.planning.memory_report import read_total

WRONG, NO_ROOM, NO_TOPOLOGY = 3, 4, 5
"""Exit codes of the child; see `diffusion/ahead_of_time.py`."""
_CHILD = "sdtpu_worker.diffusion.ahead_of_time"
_MODULE = "jit_local_tick"
_EVERY_S, _SAY_EVERY_S = 0.2, 10.0
_WARNING_LINES = ("WARNING", "Failed to find host bounds", "I0000", "W0000", "I1", "W1")


class PlanFailed(SdtpuError):
    """The programs could not be compiled; the text says why and what to do."""


@dataclass(frozen=True)
class Wanted:
    """What to compile: what makes a worker's programs, as its settings say it.

    Attributes:
        model: as `--model`.
        topology: as `chips.Topology.name`.
        slots: of each device.
        resolution: `(height, width)` in pixels; None for the model's own.
        guidance, image_inputs, prompt_windows, attention, vae_tiling: as the settings of these names; to compile
            `auto` is as `off`, and who plans compiles again with `on` where that does not fit.
        lora_rank: that programs have room for; 0 for no LoRAs of single jobs.
        controlnets: each one's name, and its folder; an empty text for one as they are usual for the model.
        previews: jobs show previews.
        dtype: of parameters and computation.
    """

    model: str
    topology: str
    slots: int
    resolution: tuple[int, int] | None = None
    guidance: str = "auto"
    lora_rank: int = 0
    image_inputs: bool = True
    prompt_windows: int = 3
    controlnets: tuple[tuple[str, str], ...] = ()
    previews: bool = False
    attention: str = "auto"
    vae_tiling: str = "auto"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Limits:
    """What a compile may take.

    Attributes:
        full: wait for the generated code, which has the compiler's estimate of cycles.
        time_s: seconds after which it is ended; what is known by then counts.
        memory_bytes: that the child may have in memory.
    """

    full: bool = False
    time_s: float = 900.0
    memory_bytes: int = 12 * GIB


def check_installed() -> None:
    """Make sure that the child can run.

    Raises:
        ConfigurationError: a package is missing.
    """
    missing = [name for name in ("jax", "flax", "tokenizers", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"sdtpu plan needs {', '.join(missing)}, which is not installed: pip install 'sdtpu_worker[plan]'"
        )


def compile_ahead(wanted: Wanted, limits: Limits, say: Callable[[str], None]) -> dict[str, Any]:
    """Compile one setting's programs, and return what they say.

    Args:
        wanted: the setting.
        limits: how long, and how much.
        say: called with a line of progress.

    Returns:
        The facts that the child writes, and `programs`: by name `argument_bytes`, `temp_bytes`, `total_bytes`,
        `code_bytes` (None before code is generated), `aliased`, `collectives`, and for the tick `parts`, the work of
        each. `fits` is False, with `reason`, where the compiler finds no room; then the tick's program may be missing.

    Raises:
        ConfigurationError: the model, the topology or the size is wrong.
        PlanFailed: the child failed, or took too long or too much memory before it had compiled anything.
    """
    with tempfile.TemporaryDirectory(prefix="sdtpu-plan-") as scratch:
        folder, dump = Path(scratch, "out"), Path(scratch, "dump")
        folder.mkdir()
        with Path(scratch, "stderr").open("w+", encoding="utf-8", errors="replace") as errors:
            child = _start(wanted, folder, dump, errors, limits.full)
            try:
                ended = _watch(child, dump, limits, f"{wanted.model}, {slots_per_device(wanted.slots)}", folder, say)
            finally:
                _end(child)
            errors.seek(0)
            reason = last_line(errors.read())
        code = child.returncode if ended == "exit" else None
        _check_exit(code, reason, wanted)
        return _collect(folder, dump, code, ended, reason, parse_topology(wanted.topology).chip)


def _start(wanted: Wanted, folder: Path, dump: Path, errors: Any, full: bool) -> subprocess.Popen[bytes]:
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={_MODULE}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",  # the devices of this machine, if it has any, are left alone
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program that is loaded is not written down
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": flags,
    }
    if full:
        env["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump_options(dump)}".strip()
    command = [sys.executable, "-m", _CHILD, str(folder), json.dumps({**asdict(wanted), "with_kernels": full})]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin:
        child.stdin.close()


def _watch(
    child: subprocess.Popen[bytes], dump: Path, limits: Limits, what: str, folder: Path, say: Callable[[str], None]
) -> str:
    """Wait until the child has done what is wanted.

    Returns:
        `exit`, `dumped` (the optimised program is written, which is all that is wanted) or `time`.

    Raises:
        PlanFailed: it takes too much memory.
    """
    started, said, sizes, traced = time.monotonic(), 0.0, None, False
    say(f"{what}: tracing the programs from shapes")
    while child.poll() is None:
        time.sleep(_EVERY_S)
        elapsed = time.monotonic() - started
        used = _resident_bytes(child.pid)
        if used > limits.memory_bytes:
            raise PlanFailed(
                f"the compiler used {used / GIB:.1f} GiB of memory, more than --memory-limit allows"
                f" ({limits.memory_bytes / GIB:.1f} GiB); give it more, or plan fewer slots per device"
            )
        if not traced and (folder / "facts.json").is_file():
            traced = True
            say(f"{what}: traced after {elapsed:.0f} s; compiling")
        if elapsed - said >= _SAY_EVERY_S:
            said = elapsed
            cpu_s = _cpu_s(child.pid)
            say(f"{what}: {elapsed:.0f} s, of them {cpu_s:.0f} s on a CPU; {used / GIB:.1f} GiB in memory")
        before, sizes = sizes, _dumped_sizes(dump)
        if not limits.full and sizes and sizes == before and _is_whole(dump):
            return "dumped"
        if elapsed > limits.time_s:
            return "time"
    return "exit"


def _dumped(dump: Path) -> tuple[Path, Path] | None:
    """Return the files of the optimised tick and of its memory, if both are there."""
    programs = sorted(dump.glob(f"*{_MODULE}*after_optimizations.txt"))
    reports = sorted(dump.glob(f"*{_MODULE}*memory-usage-report.txt"))
    return (programs[-1], reports[-1]) if programs and reports else None


def _dumped_sizes(dump: Path) -> tuple[int, ...] | None:
    files = _dumped(dump)
    return files and tuple(file.stat().st_size for file in files)


def _is_whole(dump: Path) -> bool:
    files = _dumped(dump)
    if files is None or read_total(files[1].read_text(encoding="utf-8")) is None:
        return False
    with files[0].open("rb") as file:
        file.seek(max(0, files[0].stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")


def _collect(folder: Path, dump: Path, code: int | None, ended: str, reason: str, chip: Chip) -> dict[str, Any]:
    facts_file, files = folder / "facts.json", _dumped(dump)
    if not facts_file.is_file() or (files is None and code != NO_ROOM and not (folder / "tick.json").is_file()):
        raise PlanFailed(
            "the time limit passed before the compiler had optimised the tick; give a larger --time-limit"
            if ended == "time"
            else f"the compiler ended without a result: {reason or 'it said nothing'}"
        )
    facts: dict[str, Any] = json.loads(facts_file.read_text(encoding="utf-8"))
    kernel_cycles = KernelCycles(facts["kernels"], read_bundles(dump), chip)
    programs = {}
    for file in sorted(folder.glob("*.json")):
        if file != facts_file:
            text = file.with_suffix(".hlo").read_text(encoding="utf-8")
            programs[file.stem] = describe(
                text, json.loads(file.read_text(encoding="utf-8"))["memory"], None, kernel_cycles
            )
    if "tick" not in programs and files is not None and _is_whole(dump):
        total = read_total(files[1].read_text(encoding="utf-8"))
        programs["tick"] = describe(files[0].read_text(encoding="utf-8"), None, total)
    return {
        **facts,
        "programs": programs,
        "fits": code != NO_ROOM,
        "reason": reason if code == NO_ROOM else None,
        "code_generated": programs.get("tick", {}).get("code_bytes") is not None,
        "time_limit_passed": ended == "time",
    }


def describe(
    text: str,
    memory: dict[str, int] | None,
    total: int | None = None,
    kernel_cycles: Callable[[str, bool], int] = lambda text, has_windows: 0,
) -> dict[str, Any]:
    """Return what an optimised program says of itself.

    Args:
        text: the HLO module.
        memory: what the compiled program says of its memory; None before code is generated.
        total: else the bytes of the HBM that it takes with its arguments.
        kernel_cycles: as for `Traffic`.
    """
    traffic = Traffic(parse_module(text), kernel_cycles)
    arguments = memory["argument"] if memory else traffic.argument_bytes
    if memory:
        total = arguments + memory["temp"] + memory["output"] - memory["alias"]
    found: dict[str, Any] = {
        "argument_bytes": arguments,
        "temp_bytes": None if total is None else total - arguments,
        "total_bytes": total,
        "code_bytes": memory["generated_code"] if memory else None,
        "aliased": traffic.aliased,
        "collectives": traffic.collectives,
    }
    is_tick = text.startswith(f"HloModule {_MODULE}")
    return {**found, "parts": asdict(traffic.tick()) if is_tick else {"all": asdict(traffic.total())}}


def _check_exit(code: int | None, reason: str, wanted: Wanted) -> None:
    if code in (None, 0, NO_ROOM):
        return
    if code == WRONG:
        raise ConfigurationError(reason)
    if "already in use" in reason or "lockfile" in reason:
        raise PlanFailed(f"libtpu is in use by another process; wait for it to end, or stop it: {reason}")
    if code == NO_TOPOLOGY:
        raise ConfigurationError(f"--topology {wanted.topology} is not known to the installed libtpu: {reason}")
    raise PlanFailed(f"the compiler failed with exit code {code}: {reason or 'it said nothing'}")


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_WARNING_LINES)]
    return f"{lines[-1]:.600}" if lines else ""


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0  # it has just ended, or this is no Linux


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def slots_per_device(slots: int) -> str:
    """Return it in words."""
    return f"{slots} slot{'s' if slots > 1 else ''} per device"
