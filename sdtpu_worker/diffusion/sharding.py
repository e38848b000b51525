"""Find the host's devices, and shard all state over the one axis of their mesh."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.kernel_table import kernel_platform

AXIS = "device"
SHARDED = PartitionSpec(AXIS)
REPLICATED = PartitionSpec()
_GPU_PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def find_devices(platform: str, cpu_devices: int) -> list[jax.Device]:
    """Return this host's devices.

    Call it before anything else starts a JAX backend: that fixes the number of simulated CPU devices.

    Args:
        platform: `tpu`, `gpu`, `cpu`, or `auto` for the platform that JAX prefers on this host.
        cpu_devices: how many devices to simulate on the CPU; a count in XLA_FLAGS takes precedence.

    Raises:
        ConfigurationError: the host has no such platform, or GPUs of several kinds; the text names what was found, what
            was wanted and what to do.
    """
    if _HOST_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        _configure("jax_num_cpu_devices", cpu_devices)
    if platform == "cpu":
        _configure("jax_platforms", "cpu")
    try:
        devices = jax.local_devices()
    except Exception as exc:  # RuntimeError where a backend fails, and others where a plugin is missing
        wanted = platform if platform != "auto" else os.environ.get("JAX_PLATFORMS", "")
        raise ConfigurationError(
            f"JAX finds no devices (sdtpu_platform is {platform!r}, JAX_PLATFORMS is"
            f" {os.environ.get('JAX_PLATFORMS', '')!r}): {type(exc).__name__}: {exc}; {_what_is_missing(wanted)}"
        ) from exc
    found = devices[0].platform
    if platform not in ("auto", found):
        raise ConfigurationError(
            f"sdtpu_platform is {platform!r}, but the devices found are {len(devices)} of kind"
            f" {devices[0].device_kind!r} (platform {found!r}); {_what_is_missing(platform)}; or set sdtpu_platform to"
            f" 'auto' or {found!r}"
        )
    if len(kinds := sorted({device.device_kind for device in devices})) > 1:
        raise ConfigurationError(
            f"the devices of a worker must be of one kind, since all run one program, got {', '.join(kinds)}; give each"
            " kind a worker of its own, with CUDA_VISIBLE_DEVICES"
        )
    return devices


def platform_of(device: jax.Device) -> str:
    """Return what the table of kernels calls a device's platform."""
    return kernel_platform(device.platform, device.device_kind, getattr(device, "compute_capability", None))


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """Return the mesh of all devices on one axis."""
    return Mesh(np.array(devices), (AXIS,))


def put(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place host arrays on the mesh, replicated or split along their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def by_device(array: jax.Array) -> dict[int, jax.Array]:
    """Return every device's shard of an array with one row per device, which is split over `make_mesh`'s devices."""
    return {device: array.addressable_data(device) for device in range(len(array.sharding.device_set))}


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


def _what_is_missing(platform: str) -> str:
    """Return what to install, or what to look at, where JAX finds no device of a platform."""
    if platform in ("gpu", "cuda"):
        if not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
            return "JAX's plugin for NVIDIA GPUs is not installed: pip install 'sdtpu_worker[gpu]' on a host with a GPU"
        return (
            "JAX's plugin for NVIDIA GPUs is installed and finds none: `nvidia-smi` must list one, with a driver for"
            " CUDA 12 or newer, and neither CUDA_VISIBLE_DEVICES nor JAX_PLATFORMS may hide it"
        )
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'sdtpu_worker[tpu]' on a host with a TPU"
    return f"run on a host that has a {platform.upper()} which no other process holds"


def _configure(option: str, value: Any) -> None:
    try:
        jax.config.update(option, value)
    except RuntimeError:
        return  # a backend runs already: a program that embeds this one has chosen its devices
