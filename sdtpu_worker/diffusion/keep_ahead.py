"""Make a worker's kept programs before it starts, also for devices that are not here: the child of `sdtpu compile`.

    python -m sdtpu_worker.diffusion.keep_ahead SPECIFICATION

The specification is JSON: `settings`, as an app's configuration has them; `topology`, such as `v5e:2x4`, or null for
the devices of this machine; `hbm_bytes`, the memory of each described one; `force`, to compile what is there as well.
Programs are made from the checkpoint's configs alone, by the code with which a worker starts, and kept under the name
by which it looks for them. Each line on the standard output is a JSON object: what is known at first (`fingerprint`,
…), then one for each program, as it begins (`begins`) and when it is there (`file`). It ends when its standard input
does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from sdtpu_worker.config import Config, read_config
from sdtpu_worker.diffusion.ahead_of_time import (
    NO_ROOM,
    NO_TOPOLOGY,
    WRONG,
    NoTopology,
    described_devices,
    end_with_parent,
)
from sdtpu_worker.diffusion.checkpoint import open_checkpoint
from sdtpu_worker.diffusion.compilation import (
    TICK,
    Name,
    all_programs,
    compile_one,
    geometry_of,
    kept_programs_of,
    trace_one,
)
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.kept_programs import KeptPrograms, is_whole
from sdtpu_worker.diffusion.memory import bytes_per_device, check_limit, device_memory, memory_needs
from sdtpu_worker.diffusion.preparation import format_size
from sdtpu_worker.diffusion.program_setting import Setting, geometries_of, shapes_on_mesh, sizes_of
from sdtpu_worker.diffusion.sharding import find_devices, make_mesh, platform_of
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.diffusion.start import choose_dtype, load_options, programs_folder
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.kernel_table import check_wanted


def keep_ahead(config: Config, topology: str | None, hbm_bytes: int | None, force: bool) -> None:
    """Make all programs that a worker with these settings loads, and say so on the standard output.

    Args:
        config: the settings.
        topology: a described one, such as `v5e:2x4`; None for this machine's devices.
        hbm_bytes: memory of one of the described devices; None for this machine's.
        force: also make those that are there.

    Raises:
        ConfigurationError: a setting is wrong, or a program does not fit the devices' memory.
        InvalidCheckpoint: the checkpoint cannot be used.
        OSError: the folder cannot be written.
    """
    folder = programs_folder(config)
    if folder is None:
        raise ConfigurationError(
            "sdtpu_programs, or sdtpu_compile_cache, must name the folder for the programs, got off"
        )
    if not isinstance(config.slots_per_device, int):
        raise ConfigurationError("sdtpu_slots_per_device must be a number for programs that are made ahead, got auto")
    if topology is not None and config.platform not in ("auto", "tpu"):
        raise ConfigurationError(f"sdtpu_platform must be auto or tpu for --topology {topology}, got {config.platform}")
    devices = find_devices(config.platform, config.cpu_devices) if topology is None else described_devices(topology)
    check_wanted(platform_of(devices[0]), config.attention)
    dtype = choose_dtype(config.dtype, devices[0].platform)
    checkpoint, _ = open_checkpoint(config.model, dtype, load_options(config))
    setting = Setting(
        config.slots_per_device, config.resolutions, config.preview_every > 0, config.vae_tiling, config.attention
    )
    sizes = sizes_of(checkpoint, setting)
    mesh = make_mesh(devices)
    keep = kept_programs_of(checkpoint, shapes_on_mesh(checkpoint, mesh)[0], mesh, folder)
    _say(
        fingerprint=keep.fingerprint,
        folder=str(folder),
        model=config.model,
        dtype=dtype.__name__,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        slots_per_device=config.slots_per_device,
        resolutions=[format_size(lane) for lane in sizes.lanes],
    )
    keep.write_facts()
    limit = device_memory(devices[0]) if topology is None else hbm_bytes

    def keep_all(in_tiles: bool) -> None:
        geometries = geometries_of(checkpoint, setting, mesh, in_tiles)
        programs = all_programs(checkpoint, *shapes_on_mesh(checkpoint, mesh), geometries, mesh, setting.with_previews)
        ticks = []
        for name, lower in programs.items():
            compiled = _keep(keep, name, geometry_of(name, geometries), partial(trace_one, lower, checkpoint), force)
            if compiled is not None and name[0] == TICK:
                ticks.append(compiled)
                slots = sum(bytes_per_device(each.empty_slots(), len(devices)) for each in geometries.values())
                needs = memory_needs(sizes.parameters, slots, ticks, sizes.bank)
                check_limit(limit, devices[0].device_kind, needs)

    try:
        keep_all(setting.vae_tiling == "on")
    except ConfigurationError as exc:
        if setting.vae_tiling != "auto" or not is_out_of_memory(exc):
            raise
        _say(note=f"{exc}; compiling again, to decode images in tiles (sdtpu_vae_tiling)")
        keep_all(True)


def _keep(
    keep: KeptPrograms, name: Name, geometry: Geometry, lower: Callable[[], jax.stages.Lowered], force: bool
) -> jax.stages.Compiled | None:
    """Make one program's file, and return what was compiled; None if the file was there."""
    kind, lane = name
    what: dict[str, Any] = {"program": kind, "resolution": lane and format_size(lane)}
    path = None if force else keep.find(*name, geometry)
    if path is not None and is_whole(path):
        _say(file=str(path), bytes=path.stat().st_size, was_there=True, **what)
        return None
    started = time.monotonic()
    _say(begins="tracing", **what)
    lowered = lower()
    _say(begins="compiling", **what)
    compiled = compile_one(lowered)
    path = keep.write(*name, geometry, compiled)
    seconds = round(time.monotonic() - started, 1)
    _say(file=str(path), bytes=path.stat().st_size, was_there=False, seconds=seconds, **what)
    return compiled


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def run(argv: list[str]) -> int:
    """Do what the command line says, and return the exit code; errors are one line."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    wanted = json.loads(argv[0])
    try:
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # a copy of a program that was loaded may lack functions
        keep_ahead(read_config(wanted["settings"]), wanted["topology"], wanted["hbm_bytes"], wanted["force"])
    except NoTopology as exc:
        print(exc, file=sys.stderr)
        return NO_TOPOLOGY
    except (ConfigurationError, OSError) as exc:
        print(exc, file=sys.stderr)
        return NO_ROOM if is_out_of_memory(exc) else WRONG
    return 0


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libtpu's threads are not waited for
