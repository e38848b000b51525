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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.diffusion.abstract_checkpoint import read_abstract
from sdtpu_worker.diffusion.adapter_bank import num_entries
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.families.family import Family, Params, Pictures
from sdtpu_worker.diffusion.lone_kernels import compile_lone_kernels
from sdtpu_worker.diffusion.matmul_counts import (
    KernelWork,
    Matmuls,
    collecting_kernels,
    count_least_and_most,
    count_matmuls,
)
from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.diffusion.program_setting import check_sizes
from sdtpu_worker.diffusion.programs import lower_fill_bank, lower_preview, lower_restore, lower_snapshot, lower_tick
from sdtpu_worker.diffusion.sharding import REPLICATED, make_mesh, platform_of
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.diffusion.tiled_decoding import decode_in_tiles
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.kept_files import write_whole
from sdtpu_worker.models.kernel_table import TABLE, Implementation, Row, check_wanted
from sdtpu_worker.models.selection import Selection, current_selection, selecting

WRONG, NO_ROOM, NO_TOPOLOGY = 3, 4, 5
"""Exit codes besides 0 and 1: the specification is wrong; a program does not fit; libtpu gives no such topology."""


_ALL_WINDOWS = Row("*", Implementation.PLAIN, "to count what all windows of prompts take", counts_keys=True)


class NoTopology(Exception):
    """libtpu does not describe the devices that were asked for."""


def main(folder: Path, wanted: dict[str, Any]) -> None:
    """Trace and compile.

    Args:
        folder: for the results; must exist.
        wanted: the fields of `planning.compile_ahead.Wanted`, and `with_kernels`: compile each kernel by itself too,
            of which libtpu then writes down the instructions.

    Raises:
        ConfigurationError: the model or the sizes are wrong.
    """
    checkpoint = read_abstract(
        wanted["model"],
        jnp.dtype(wanted["dtype"]),
        wanted["guidance"],
        wanted["lora_rank"],
        wanted["image_inputs"],
        wanted["prompt_windows"],
        dict(wanted["controlnets"]),
    )
    family, slots = checkpoint.family, wanted["slots"]
    lane = tuple(wanted["resolution"] or family.default_size)
    check_sizes(family, (lane,))
    check_wanted("tpu", wanted["attention"])
    mesh = make_mesh(described_devices(wanted["topology"]))
    entries = num_entries(1, slots, phases_per_tick(slots)) if checkpoint.adapters else 0
    in_tiles, attention = wanted["vae_tiling"] == "on", wanted["attention"]
    geometry = Geometry.of(family, mesh.devices.size, slots, lane, in_tiles, checkpoint.adapters, entries, attention)
    params = _on_mesh(checkpoint.params, mesh)
    started = time.monotonic()
    tick = lower_tick(family, params, geometry, mesh)
    matmuls, kernels = _matmuls(family, checkpoint.params, geometry, platform_of(mesh.devices.flat[0]))
    facts = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "num_devices": mesh.devices.size,
        "resolution": list(lane),
        "rows_per_job": family.rows,
        "default_steps": checkpoint.defaults.num_inference_steps,
        "parameter_bytes": bytes_per_device(checkpoint.params),
        "unet_bytes": bytes_per_device(checkpoint.params["unet"]),
        "controlnet_bytes": sum(
            bytes_per_device(leaves) for part, leaves in checkpoint.params.items() if part.startswith("controlnet ")
        ),
        "controlnets": list(family.control_names),
        "prompt_windows": wanted["prompt_windows"],
        "in_tiles": in_tiles,
        "slot_bytes": bytes_per_device(geometry.empty_slots(), mesh.devices.size),
        "bank_bytes": checkpoint.adapters.entry_bytes * (entries + 1) if checkpoint.adapters else 0,
        "entry_bytes": checkpoint.adapters.entry_bytes if checkpoint.adapters else 0,
        "donated": len(jax.tree.leaves(geometry.empty_slots())),
        **matmuls,
        "trace_s": round(time.monotonic() - started, 1),
    }
    write_whole(folder / "facts.json", json.dumps(facts).encode())
    small = {"snapshot": lower_snapshot(geometry, mesh), "restore": lower_restore(geometry, mesh)}
    if wanted["previews"]:
        small["preview"] = lower_preview(geometry, mesh)
    if checkpoint.adapters is not None:
        small["fill bank"] = lower_fill_bank(checkpoint.adapters, entries, mesh)
    if wanted["with_kernels"]:
        compile_lone_kernels([each.equation for each in kernels.values()], mesh.devices.flat[0])
    for name, program in {**small, "tick": tick}.items():
        _compile(folder, name, program)


def described_devices(topology: str) -> list[Any]:
    """Return the described devices of one host, such as those of `v5e:2x4`.

    Raises:
        NoTopology: libtpu does not describe them.
    """
    host = [*map(int, topology.partition(":")[2].split("x")), 1, 1][:3]
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", chips_per_host_bounds=host).devices)
    except Exception as exc:  # whatever libtpu finds wrong with it, or with itself
        raise NoTopology(str(exc)) from exc


def _on_mesh(params: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params)


def _matmuls(
    family: Family, params: Params, geometry: Geometry, platform: str
) -> tuple[dict[str, Any], dict[str, KernelWork]]:
    """Return what the matrix unit does on one device, by part of a phase, and what is known of kernels.

    Returns:
        `matmuls`: of the layers as they are written, as `count_parts` has them. `matmuls_on_chip`: as the platform's
        convolutions do the same; they leave out what meets the same pixels. `kernels`: by the keys of
        `collecting_kernels` the numbers of `KernelWork`. And the latter.
    """
    kept = Selection(platform, geometry.attention)
    plain_rows = [row for row in TABLE if row.implementation is Implementation.PLAIN]
    only_convolutions = replace(kept, table=plain_rows, dense_block_rows=lambda *_: 0, chosen={})
    plain = count_parts(family, params, geometry)
    # Kernels of attention do what the layers do, in lanes that are padded, which the counts of layers know already.
    with selecting(only_convolutions):
        on_chip = count_parts(family, params, geometry)
    with selecting(kept), collecting_kernels() as found:
        count_parts(family, params, geometry)
    kernels = {
        key: {
            "steps": each.steps,
            "matmuls": _listed(each.matmuls),
            "matmuls_of_one_window": _listed(each.matmuls_of_one_window),
        }
        for key, each in found.items()
    }
    return {"matmuls": plain, "matmuls_on_chip": on_chip, "kernels": kernels}, found


def count_parts(family: Family, params: Params, geometry: Geometry) -> dict[str, list[list[int]]]:
    """Return by part of a phase `[m, k, n, times]` of what the matrix unit does in it, on one device.

    Args:
        family: the model.
        params: its parameters, or their shapes.
        geometry: the sizes.
    """
    layout, latent = geometry.adapters, _shape(geometry.latent_shape)
    bank = None if layout is None else layout.shapes((geometry.adapter_entries,))

    def adapters(bank: Any, count: int) -> Any:
        return None if layout is None else {part: layout.pick(bank, jnp.zeros(count, jnp.int32), part) for part in bank}

    def decode(params: Any, latents: Any) -> Any:
        if geometry.decode_tile:
            return decode_in_tiles(partial(family.decode, params), latents, geometry.decode_tile, family.scale_factor)
        return family.decode(params, latents)

    inputs = {name: _shape(leaf.shape, leaf.dtype) for name, leaf in geometry.inputs.items()}
    image = _shape((geometry.height, geometry.width, 3))
    pictures = None
    if geometry.takes_pictures:
        pictures = Pictures(image, _shape(image.shape[:2], bool), _shape((2, *geometry.latent_shape)))
    found = {
        **_count_steps(family, params, geometry, adapters, bank),
        "insert": count_matmuls(
            lambda p, i, seen, b: family.encode(p, i, seen, adapters(b, family.rows)), params, inputs, pictures, bank
        ),
        "decode": count_matmuls(decode, params, latent),
        "picture": Counter[tuple[int, int, int]](),
    }
    if geometry.takes_pictures:
        found["picture"] = count_matmuls(family.encode_image, params, image, latent)
    return {name: _listed(matmuls) for name, matmuls in found.items()}


def _count_steps(
    family: Family, params: Params, geometry: Geometry, adapters: Callable[[Any, int], Any], bank: Any
) -> dict[str, Matmuls]:
    """Return what a step does, and besides while all prompts have all windows, and for all ControlNets.

    What comes on top may have products that occur less than never, of which a step has one with other sizes instead.
    """
    rows = geometry.slots_per_device * family.rows
    x, t = _shape((rows, *geometry.latent_shape)), _shape((rows,))
    conditioning = {name: _shape((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in geometry.conditioning.items()}

    def predict(params: Any, x: Any, t: Any, conditioning: Any, bank: Any) -> Any:
        return family.predict(params, x, t, conditioning, None, adapters(bank, rows))

    least, _ = count_least_and_most(predict, params, x, t, conditioning, bank)
    with selecting(replace(current_selection(), table=[_ALL_WINDOWS], chosen={})):
        windows = count_matmuls(predict, params, x, t, conditioning, bank)
    windows.subtract(least)
    control = Counter[tuple[int, int, int]]()
    for number, embedded in enumerate(geometry.controls):
        ask = partial(_ask_control, family, number)
        seen = _shape((rows, *embedded.shape), embedded.dtype)
        control += count_least_and_most(ask, params, x, t, conditioning, seen)[0]
    return {"step": least, "windows": windows, "control": control}


def _ask_control(family: Family, number: int, params: Any, *arrays: Any) -> Any:
    return family.control(params, number, *arrays)


def _shape(sizes: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _listed(matmuls: Matmuls) -> list[list[int]]:
    return [[*shape, times] for shape, times in sorted(matmuls.items()) if times]


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


def end_with_parent() -> None:
    """End this process when its standard input ends."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def run(argv: list[str]) -> int:
    """Run `main` with the arguments of the command line, and return the exit code; errors are one line."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    try:
        main(Path(argv[0]), json.loads(argv[1]))
    except ConfigurationError as exc:
        print(exc, file=sys.stderr)
        return WRONG
    except NoTopology as exc:
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
