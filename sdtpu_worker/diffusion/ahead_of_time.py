"""Compile an engine's programs for devices that are not here: the child process of `sdtpu plan`.

    python -m sdtpu_worker.diffusion.ahead_of_time FOLDER SPECIFICATION

It traces the programs as the engine does, from shapes alone, and compiles them for a described topology. It writes
`facts.json` into the folder when it has traced them, then for each program that is compiled `NAME.hlo` and
`NAME.json`. It ends when its standard input does, so that it never outlives the process that reads the folder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.diffusion.abstract_checkpoint import AbstractCheckpoint, read_abstract
from sdtpu_worker.diffusion.adapter_bank import num_entries
from sdtpu_worker.diffusion.engine import check_sizes
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.families.family import Pictures
from sdtpu_worker.diffusion.matmul_counts import Matmuls, count_matmuls
from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.diffusion.programs import lower_fill_bank, lower_restore, lower_snapshot, lower_tick
from sdtpu_worker.diffusion.sharding import REPLICATED, make_mesh
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.kept_files import write_whole

WRONG, NO_ROOM, NO_TOPOLOGY = 3, 4, 5
"""Exit codes besides 0 and 1: the specification is wrong; a program does not fit; libtpu gives no such topology."""


class _NoTopology(Exception):
    """libtpu does not describe the devices that were asked for."""


def main(folder: Path, wanted: dict[str, Any]) -> None:
    """Trace and compile.

    Args:
        folder: for the results; must exist.
        wanted: `model`, `topology`, `slots`, `resolution` (two numbers, or None), `guidance`, `lora_rank`.

    Raises:
        ConfigurationError: the model or the sizes are wrong.
    """
    checkpoint = read_abstract(wanted["model"], jnp.bfloat16, wanted["guidance"], wanted["lora_rank"])
    family, slots = checkpoint.family, wanted["slots"]
    lane = tuple(wanted["resolution"] or family.default_size)
    check_sizes(family, (lane,))
    mesh = make_mesh(_devices(wanted["topology"]))
    entries = num_entries(1, slots, phases_per_tick(slots)) if checkpoint.adapters else 0
    geometry = Geometry.of(family, mesh.devices.size, slots, lane, False, checkpoint.adapters, entries)
    params = _on_mesh(checkpoint.params, mesh)
    started = time.monotonic()
    tick = lower_tick(family, params, geometry, mesh)
    facts = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "num_devices": mesh.devices.size,
        "resolution": list(lane),
        "rows_per_job": family.rows,
        "default_steps": checkpoint.defaults.num_inference_steps,
        "parameter_bytes": bytes_per_device(checkpoint.params),
        "unet_bytes": bytes_per_device(checkpoint.params["unet"]),
        "slot_bytes": bytes_per_device(geometry.empty_slots(), mesh.devices.size),
        "bank_bytes": checkpoint.adapters.entry_bytes * (entries + 1) if checkpoint.adapters else 0,
        "entry_bytes": checkpoint.adapters.entry_bytes if checkpoint.adapters else 0,
        "donated": len(jax.tree.leaves(geometry.empty_slots())),
        "matmuls": _matmuls(checkpoint, geometry),
        "trace_s": round(time.monotonic() - started, 1),
    }
    write_whole(folder / "facts.json", json.dumps(facts).encode())
    small = {"snapshot": lower_snapshot(geometry, mesh), "restore": lower_restore(geometry, mesh)}
    if checkpoint.adapters is not None:
        small["fill bank"] = lower_fill_bank(checkpoint.adapters, entries, mesh)
    for name, program in {**small, "tick": tick}.items():
        _compile(folder, name, program)


def _devices(topology: str) -> list[Any]:
    """Return the described devices of one host, such as those of `v5e:2x4`."""
    host = [*map(int, topology.partition(":")[2].split("x")), 1, 1][:3]
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", chips_per_host_bounds=host).devices)
    except Exception as exc:  # whatever libtpu finds wrong with it, or with itself
        raise _NoTopology(str(exc)) from exc


def _on_mesh(params: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params)


def _matmuls(checkpoint: AbstractCheckpoint, geometry: Geometry) -> dict[str, list[list[int]]]:
    """Return by part of a phase `[m, k, n, times]` of what the matrix unit does in it, on one device."""
    family, params, rows = checkpoint.family, checkpoint.params, geometry.slots_per_device * checkpoint.family.rows
    layout, latent = geometry.adapters, _shape(geometry.latent_shape)
    bank = None if layout is None else layout.shapes((geometry.adapter_entries,))

    def adapters(bank: Any, count: int) -> Any:
        return None if layout is None else {part: layout.pick(bank, jnp.zeros(count, jnp.int32), part) for part in bank}

    conditioning = {name: _shape((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in geometry.conditioning.items()}
    inputs = {name: _shape(leaf.shape, leaf.dtype) for name, leaf in geometry.inputs.items()}
    image = _shape((geometry.height, geometry.width, 3))
    pictures = None
    if geometry.takes_pictures:
        pictures = Pictures(image, _shape(image.shape[:2], bool), _shape((2, *geometry.latent_shape)))
    found = {
        "step": count_matmuls(
            lambda p, x, t, c, b: family.predict(p, x, t, c, None, adapters(b, rows)),
            params, _shape((rows, *geometry.latent_shape)), _shape((rows,)), conditioning, bank,
        ),
        "insert": count_matmuls(
            lambda p, i, seen, b: family.encode(p, i, seen, adapters(b, family.rows)), params, inputs, pictures, bank
        ),
        "decode": count_matmuls(family.decode, params, latent),
        "picture": Counter[tuple[int, int, int]](),
    }  # fmt: skip
    if geometry.takes_pictures:
        found["picture"] = count_matmuls(family.encode_image, params, image, latent)
    return {name: _listed(matmuls) for name, matmuls in found.items()}


def _shape(sizes: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _listed(matmuls: Matmuls) -> list[list[int]]:
    return [[*shape, times] for shape, times in sorted(matmuls.items())]


def _compile(folder: Path, name: str, program: jax.stages.Lowered) -> None:
    started = time.monotonic()
    compiled = program.compile()
    analysis = compiled.memory_analysis()
    memory = {
        key: int(getattr(analysis, f"{key}_size_in_bytes"))
        for key in ("argument", "output", "alias", "temp", "generated_code")
    }
    write_whole(folder / f"{name}.hlo", (compiled.as_text() or "").encode())
    facts = {"memory": memory, "compile_s": round(time.monotonic() - started, 1)}
    write_whole(folder / f"{name}.json", json.dumps(facts).encode())


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def run(argv: list[str]) -> int:
    """Run `main` with the arguments of the command line, and return the exit code; errors are one line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    try:
        main(Path(argv[0]), json.loads(argv[1]))
    except ConfigurationError as exc:
        print(exc, file=sys.stderr)
        return WRONG
    except _NoTopology as exc:
        print(exc, file=sys.stderr)
        return NO_TOPOLOGY
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        print(str(exc).strip().split("\n", 1)[0], file=sys.stderr)
        return NO_ROOM
    return 0


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # libtpu's threads are not waited for
