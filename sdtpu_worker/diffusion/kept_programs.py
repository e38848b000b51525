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
_HALF_S = 3600.0
"""Seconds after which a half-written file is one that a killed process left."""
_VERSIONS_OF = ("jax", "jaxlib", "flax", "numpy", "libtpu")
_NOT_IN_PROGRAMS = ("cache", "log", "dump", "traceback", "num_cpu_devices")
"""JAX's options whose names hold one of these change no program."""


class KeptPrograms:
    """Programs in one folder. Any thread.

    Args:
        folder: where they lie; it is made if need be.
        facts: everything that the programs are made of; see `facts_of`.
        mesh: the devices that they run on.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], mesh: Mesh) -> None:
        self._folder, self._devices = folder, list(mesh.devices.flat)
        self._facts = json.dumps(facts, sort_keys=True, default=repr)

    def load(self, kind: str, lane: Lane | None, geometry: Geometry | None) -> jax.stages.Compiled | None:
        """Return a program that an earlier process kept; None without one, or if it cannot be used.

        Args:
            kind: what the program does.
            lane: its resolution; None for a program that has none.
            geometry: the sizes that it is made for; None for a program that has none.
        """
        path = self._path(kind, lane, geometry)
        try:
            if (reason := _distrust(self._folder) or _distrust(path)) is not None:
                logger.warning("the kept program %s is not loaded, but compiled: %s", path, reason)
                return None
            data = path.read_bytes()
            body = data[len(_MAGIC) + 32 :]
            if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : -len(body)]:
                logger.warning("the kept program %s is damaged: it is compiled again", path)
                return None
            backend = self._devices[0].client
            program = deserialize_and_load(*pickle.loads(body), backend=backend, execution_devices=self._devices)
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
        """Keep a program for later starts; a file is written as a whole or not at all.

        A program that cannot be kept is only slower to start: a line says why.

        Args:
            kind, lane, geometry: as for `load`.
            program: as compiled.
        """
        path = self._path(kind, lane, geometry)
        try:
            body = pickle.dumps(serialize(program))
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_whole(path, _MAGIC + hashlib.sha256(body).digest() + body)
            _delete_old(self._folder)
        except Exception as exc:  # a full disk, a program that cannot be serialised
            logger.warning("the program %s is not kept, the next start compiles it again: %s: %s", path,
                           type(exc).__name__, exc)  # fmt: skip

    def _path(self, kind: str, lane: Lane | None, geometry: Geometry | None) -> Path:
        digest = hashlib.sha256(repr((self._facts, kind, lane, geometry)).encode()).hexdigest()[:32]
        return self._folder / f"{kind.replace(' ', '-')}-{digest}.program"


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
        "machine": _machine() if first.platform == "cpu" else None,
        "versions": {"python": platform.python_version(), **package_versions(_VERSIONS_OF)},
        "variables": {name: os.environ.get(name) for name in COMPILER_VARIABLES},
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


@functools.cache
def _machine() -> str:
    """Return what kind of processor this is: programs for the CPU use all of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        told = [platform.processor()]
    return repr((platform.machine(), told))


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
    halves = [file for file, at in used_at.items() if file.suffix != ".program" and at < time.time() - _HALF_S]
    for file in [*programs[:-_MOST], *halves]:
        file.unlink(missing_ok=True)
