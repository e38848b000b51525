"""Compiled programs that are kept whole: a later start loads them, and neither traces nor compiles.

JAX's persistent cache (`cache.py`) spares a start the compiling alone: it finds a program by what tracing it made.
Here a program is found by everything that it is made of, which is known without tracing.

A kept program is a pickle that holds machine code: whoever can write the file can run code here. So files are read
only from a folder that this user or root owns and nobody else can write, and never come from a hub or a message.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import pickle
import platform
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.cache import COMPILER_VARIABLES
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.kept_files import package_versions, write_whole

logger = logging.getLogger(__name__)

_MAGIC = b"sdtpu program 1\n"
_MOST = 100
"""Programs in a folder; of more than these, those that were loaded or kept longest ago are deleted."""
_FACTS = "facts-"
"""The name of a file that tells what programs were made of, before their fingerprint."""
_GPU_LIBRARIES = ("jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""What programs for GPUs hold kernels of."""
_HALF_S = 3600.0
"""Seconds after which a half-written file is one that a killed process left."""
_SUFFIXES = (".program", ".json")
_VERSIONS_OF = ("jax", "jaxlib", "flax", "numpy", "libtpu")
_NOT_IN_PROGRAMS = ("cache", "log", "dump", "traceback", "num_cpu_devices", "platforms")
"""JAX's options whose names hold one of these change no program."""


class KeptPrograms:
    """Programs in one folder, and in another one that is only read. Any thread.

    Args:
        folder: where they lie and are kept; it is made if need be. None for no such folder.
        facts: everything that the programs are made of; see `facts_of`.
        mesh: the devices that they run on.
        ahead: a folder of programs that were made ahead, in which to look first; None for none.

    Attributes:
        fingerprint: of `facts`, 16 hexadecimal digits; equal ones have equal programs.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any], mesh: Mesh, ahead: Path | None = None) -> None:
        self._folder, self._ahead, self._devices = folder, ahead, list(mesh.devices.flat)
        self._facts = json.dumps(facts, sort_keys=True, default=repr)
        self.fingerprint = hashlib.sha256(self._facts.encode()).hexdigest()[:16]

    def load(self, kind: str, lane: Lane | None, geometry: Geometry | None) -> jax.stages.Compiled | None:
        """Return a program that an earlier process kept; None without one, or if it cannot be used.

        Args:
            kind: what the program does.
            lane: its resolution; None for a program that has none.
            geometry: the sizes that it is made for; None for a program that has none.
        """
        for folder in (self._ahead, self._folder):
            program = folder and self._load(folder / self._name(kind, lane, geometry))
            if program:
                return program
        return None

    def find(self, kind: str, lane: Lane | None, geometry: Geometry | None) -> Path | None:
        """Return the file of a program, without reading it; None without one that can be believed.

        Args:
            kind, lane, geometry: as for `load`.
        """
        for folder in (self._ahead, self._folder):
            with contextlib.suppress(OSError):
                path = folder and folder / self._name(kind, lane, geometry)
                if path and _distrust(path.parent) is None and _distrust(path) is None:
                    return path
        return None

    def missing(self) -> str | None:
        """Return why programs that were made ahead are not found; None without a folder of such."""
        if self._ahead is None:
            return None
        wanted, nearest = json.loads(self._facts), None
        for file in sorted(self._ahead.glob(f"{_FACTS}*.json")):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(file.read_text(encoding="utf-8"))
                differing = [name for name in wanted if found.get(name) != wanted[name]]
                nearest = differing if nearest is None or len(differing) < len(nearest) else nearest
        if nearest is None:
            return f"sdtpu_programs: {self._ahead} has no programs"
        names = ", ".join(nearest) or "sdtpu_slots_per_device, sdtpu_resolutions, previews, tiling or attention"
        return f"sdtpu_programs: the programs in {self._ahead} were made for another {names}"

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        try:
            if (reason := _distrust(path.parent) or _distrust(path)) is not None:
                logger.warning("the kept program %s is not loaded, but compiled: %s", path, reason)
                return None
            body = _body(path)
            if body is None:
                logger.warning("the kept program %s is damaged: it is compiled again", path)
                return None
            backend = self._devices[0].client
            program = deserialize_and_load(*pickle.loads(body), backend=backend, execution_devices=self._devices)
            with contextlib.suppress(OSError):  # of a folder that this process may only read
                os.utime(path)
        except FileNotFoundError:
            return None
        except Exception as exc:  # what a foreign compiler's program fails with, it alone knows
            reason = str(exc).strip().split("\n", 1)[0]
            logger.warning("the kept program %s cannot be used, and is compiled again: %s: %s", path,
                           type(exc).__name__, reason)  # fmt: skip
            return None
        return program

    def save(self, kind: str, lane: Lane | None, geometry: Geometry | None, program: jax.stages.Compiled) -> None:
        """Keep a program for later starts, if there is a folder for it.

        A program that cannot be kept is only slower to start: a line says why.

        Args:
            kind, lane, geometry: as for `load`.
            program: as compiled.
        """
        if self._folder is None:
            return
        try:
            self.write(kind, lane, geometry, program)
        except Exception as exc:  # a full disk, a program that cannot be serialised
            logger.warning("the program %s is not kept, the next start compiles it again: %s: %s",
                           self._folder / self._name(kind, lane, geometry), type(exc).__name__, exc)  # fmt: skip

    def write(self, kind: str, lane: Lane | None, geometry: Geometry | None, program: jax.stages.Compiled) -> Path:
        """Write a program's file, as a whole or not at all, and return its path.

        Args:
            kind, lane, geometry: as for `load`.
            program: as compiled.

        Raises:
            Exception: the folder cannot be written, or the program cannot be serialised.
        """
        assert self._folder is not None
        path = self._folder / self._name(kind, lane, geometry)
        body = pickle.dumps(serialize(program))
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_whole(path, _MAGIC + hashlib.sha256(body).digest() + body)
        _delete_old(self._folder)
        return path

    def write_facts(self) -> None:
        """Write down what the programs are made of, for a worker that looks for others: see `missing`.

        Raises:
            OSError: the folder cannot be written.
        """
        assert self._folder is not None
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_whole(self._folder / f"{_FACTS}{self.fingerprint}.json", self._facts.encode())

    def _name(self, kind: str, lane: Lane | None, geometry: Geometry | None) -> str:
        digest = hashlib.sha256(repr((self._facts, kind, lane, geometry)).encode()).hexdigest()[:32]
        return f"{kind.replace(' ', '-')}-{digest}.program"


def is_whole(path: Path) -> bool:
    """Return whether a program's file is as it was written."""
    with contextlib.suppress(OSError):
        return _body(path) is not None
    return False


def delete_all(folder: Path) -> None:
    """Delete every program of a folder: one of them did not run."""
    for file in folder.glob("*.program"):
        with contextlib.suppress(OSError):
            file.unlink()


def facts_of(family: Family, params: Any, mesh: Mesh, others: Any = None) -> dict[str, Any]:
    """Return what all programs of an engine are made of: the model, its code, the devices and the compiler.

    Args:
        family: the model.
        params: its parameters (arrays or shapes).
        mesh: the devices.
        others: what more some of the programs are made of.
    """
    devices = list(mesh.devices.flat)
    first = devices[0]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "code": code_digest(family),
        "family": family.facts(),
        "parameters": [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves],
        "others": others,
        "devices": (first.platform, first.device_kind, [device.id for device in devices], len(first.client.devices())),
        "machine": machine_facts(first),
        "versions": {"python": platform.python_version(), **package_versions(_VERSIONS_OF)},
        "variables": {name: os.environ.get(name) for name in COMPILER_VARIABLES},
        "GPU libraries": package_versions(_GPU_LIBRARIES),
        "options": {
            name: repr(value)
            for name, value in jax.config.values.items()
            if not any(part in name for part in _NOT_IN_PROGRAMS)
        },
    }


def code_digest(family: Family) -> str:
    """Return a digest of the source of everything that programs are traced from: this package, and the family's own."""
    package = Path(__file__).parent.parent
    files = sorted(file for folder in ("diffusion", "models") for file in (package / folder).rglob("*.py"))
    modules = (sys.modules.get(each.__module__) for each in type(family).__mro__)
    own = (getattr(module, "__file__", None) for module in modules)
    files += sorted({Path(file) for file in own if file is not None} - set(files))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def machine_facts(device: jax.Device) -> str | None:
    """Return what kind of processor this is, if it is the device; None for other devices."""
    return _machine() if device.platform == "cpu" else None


@functools.cache
def _machine() -> str:
    """Return what kind of processor this is: programs for the CPU use all of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        told = [platform.processor()]
    return repr((platform.machine(), told))


def _body(path: Path) -> bytes | None:
    """Return the pickle in a file; None if the file is damaged."""
    data = path.read_bytes()
    body = data[len(_MAGIC) + 32 :]
    is_whole = data[: len(_MAGIC)] == _MAGIC and hashlib.sha256(body).digest() == data[len(_MAGIC) : len(_MAGIC) + 32]
    return body if is_whole else None


def _distrust(path: Path) -> str | None:
    """Return why a file or folder is not to be believed; None if only this user or root can have written it.

    Raises:
        FileNotFoundError: there is none.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return f"{path} is a symbolic link"
    if facts.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to the user with the id {facts.st_uid}, not to this user or root"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (chmod go-w {path})"
    return None


def _delete_old(folder: Path) -> None:
    """Delete the programs that are too many, and what killed processes left half-written."""
    used_at: dict[Path, float] = {}
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process deletes the same ones
            used_at[file] = file.stat().st_mtime
    programs = sorted((file for file in used_at if file.suffix == ".program"), key=used_at.__getitem__)
    halves = [file for file, at in used_at.items() if file.suffix not in _SUFFIXES and at < time.time() - _HALF_S]
    for file in [*programs[:-_MOST], *halves]:
        file.unlink(missing_ok=True)
