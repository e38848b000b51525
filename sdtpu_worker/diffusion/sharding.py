"""Find the host's devices, and shard all state over the one axis of their mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdtpu_worker.errors import ConfigurationError

AXIS = "device"
SHARDED = PartitionSpec(AXIS)
REPLICATED = PartitionSpec()
_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def find_devices(platform: str, cpu_devices: int) -> list[jax.Device]:
    """Return this host's devices.

    Call it before anything else starts a JAX backend: that fixes the number of simulated CPU devices.

    Args:
        platform: `tpu`, `gpu`, `cpu`, or `auto` for the platform that JAX prefers on this host.
        cpu_devices: how many devices to simulate on the CPU; a count in XLA_FLAGS takes precedence.

    Raises:
        ConfigurationError: the host has no such platform; the text names the one found and the one wanted.
    """
    if _HOST_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        _configure("jax_num_cpu_devices", cpu_devices)
    if platform == "cpu":
        _configure("jax_platforms", "cpu")
    devices = jax.local_devices()
    found = devices[0].platform
    if platform not in ("auto", found):
        raise ConfigurationError(
            f"sdtpu_platform is {platform!r}, but the devices found are {len(devices)} of kind"
            f" {devices[0].device_kind!r} (platform {found!r}); run on a host that has a {platform.upper()}"
            f" with the matching jax installed, or set sdtpu_platform to 'auto' or {found!r}"
        )
    return devices


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """Return the mesh of all devices on one axis."""
    return Mesh(np.array(devices), (AXIS,))


def put(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place host arrays on the mesh, replicated or split along their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def by_device(array: jax.Array) -> dict[int, jax.Array]:
    """Return every device's shard of an array with one row per device."""
    return {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}


def replace_shards(tree: Any, shards: Mapping[int, Any], mesh: Mesh) -> Any:
    """Return arrays on the mesh with other rows on some devices; only those devices get data.

    Args:
        tree: of arrays with one row per device.
        shards: by device, the same tree of host arrays `(1, …)`.
        mesh: the devices.
    """

    def replace(array: jax.Array, *rows: Any) -> jax.Array:
        there = by_device(array)
        for device, row in zip(shards, rows, strict=True):
            there[device] = jax.device_put(row, mesh.devices[device])
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, list(there.values()))

    return jax.tree.map(replace, tree, *shards.values())


def _configure(option: str, value: Any) -> None:
    try:
        jax.config.update(option, value)
    except RuntimeError:
        return  # a backend runs already: a program that embeds this one has chosen its devices
