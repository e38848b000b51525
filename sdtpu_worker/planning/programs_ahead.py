"""`sdtpu compile` without its command line: the child process that makes a worker's programs, and what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.errors import ConfigurationError, SdtpuError
from sdtpu_worker.planning.chips import parse_topology
from sdtpu_worker.planning.compile_ahead import NO_ROOM, NO_TOPOLOGY, WRONG, last_line

_CHILD = "sdtpu_worker.diffusion.keep_ahead"
_SAY_EVERY_S = 10.0


class CompileFailed(SdtpuError):
    """The programs could not be made; the text says why and what to do."""


class NoRoom(CompileFailed):
    """A program does not fit the devices' memory."""


@dataclass(frozen=True)
class ProgramFile:
    """A program that a worker can load.

    Attributes:
        program: what it does.
        resolution: `height x width` in pixels, without the spaces; None for a program that has none.
        file: its path.
        bytes: its size.
        was_there: it was not made now.
        seconds: that making it took; None if it was there.
    """

    program: str
    resolution: str | None
    file: str
    bytes: int
    was_there: bool
    seconds: float | None = None


def make_programs(
    settings: Mapping[str, Any], topology: str | None, force: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Make the programs of a worker, and return what there is then.

    Args:
        settings: those of the engine, as an app's configuration has them; the environment's come first, as always.
        topology: the chips of the host, as `chips.parse_topology` reads them; None for this machine's devices.
        force: also make those that are there.
        say: called with a line of progress.

    Returns:
        `fingerprint`, `folder`, `model`, `dtype`, `device_kind`, `num_devices`, `slots_per_device`, `resolutions`,
        `topology`, and `programs`: the fields of `ProgramFile` for each of them.

    Raises:
        ConfigurationError: a setting, the checkpoint or the topology is wrong, or a package is missing.
        NoRoom: a program does not fit.
        CompileFailed: the child failed otherwise.
    """
    found = None if topology is None else parse_topology(topology)
    _check_installed(is_for_tpu=found is not None)
    wanted = {
        "settings": dict(settings),
        "topology": found and found.name,
        "hbm_bytes": found and found.chip.hbm_bytes,
        "force": force,
    }
    facts: dict[str, Any] = {}
    programs: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with _child(wanted, errors) as child, _Progress(say) as progress:
            assert child.stdout is not None
            for line in child.stdout:
                said = json.loads(line)
                if "note" in said:
                    say(said["note"])
                    programs.clear()
                elif "begins" in said:
                    progress.begin(f"{said['begins']} {_name(said)}")
                elif "file" in said:
                    progress.end()
                    programs.append(said)
                    seconds = "was there" if said["was_there"] else f"{said['seconds']:.0f} s"
                    say(f"{_name(said)}: {said['bytes'] / 2**20:.1f} MiB, {seconds}")
                else:
                    facts = said
                    say(f"for {said['num_devices']} devices of kind {said['device_kind']}, fingerprint"
                        f" {said['fingerprint']}, in {said['folder']}")  # fmt: skip
            code = child.wait()
        errors.seek(0)
        _check_exit(code, last_line(errors.read()))
    return {**facts, "topology": wanted["topology"], "programs": programs}


def _name(said: Mapping[str, Any]) -> str:
    return f"the program {said['program']}" + (f" of {said['resolution']}" if said["resolution"] else "")


def _check_installed(is_for_tpu: bool) -> None:
    names = ("jax", "flax", "tokenizers", *(("libtpu",) if is_for_tpu else ()))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extra = "tpu" if is_for_tpu else "worker"
        raise ConfigurationError(
            f"sdtpu compile needs {', '.join(missing)}, which is not installed: pip install 'sdtpu_worker[{extra}]'"
        )


@contextlib.contextmanager
def _child(wanted: Mapping[str, Any], errors: Any) -> Iterator[subprocess.Popen[str]]:
    """Start the child; end it, and what it has started, on every way out."""
    env = dict(os.environ)
    if wanted["topology"] is not None:
        env |= {
            "JAX_PLATFORMS": "cpu",  # the devices of this machine, if it has any, are left alone
            "JAX_FORCE_TPU_INIT": "1",  # JAX then gives the compiler the options that it has on a TPU host
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_MIN_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    child = subprocess.Popen(
        [sys.executable, "-m", _CHILD, json.dumps(wanted)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream:
                stream.close()


class _Progress:
    """Says from time to time what the child is at."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._what, self._since = say, "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, what: str) -> None:
        """Note what the child begins."""
        self._what, self._since = what, time.monotonic()

    def end(self) -> None:
        """Note that it has ended."""
        self.begin("going on")

    def _run(self) -> None:
        while not self._ended.wait(_SAY_EVERY_S):
            self._say(f"{self._what}, for {time.monotonic() - self._since:.0f} s")


def _check_exit(code: int, reason: str) -> None:
    if code == 0:
        return
    if code in (WRONG, NO_TOPOLOGY):
        raise ConfigurationError(reason)
    if code == NO_ROOM:
        raise NoRoom(reason)
    if "already in use" in reason or "lockfile" in reason:
        raise CompileFailed(f"libtpu is in use by another process; wait for it to end, or stop it: {reason}")
    raise CompileFailed(f"the compiler failed with exit code {code}: {reason or 'it said nothing'}")
