"""Every `sdtpu_*` setting, in one table: name, default, unit and a line of documentation.

A setting stands in the Celery app's configuration, in lower case, or in the environment, in upper case; the
environment wins, so that one image of a container can be configured where it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.contract.queues import DEFAULT_QUEUE
from sdtpu_worker.contract.request import MAX_SIDE, SIDE_MULTIPLE
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.show import show


@dataclass(frozen=True)
class Setting:
    """One setting; `parse` takes a string from the environment or a value from the app's configuration."""

    name: str
    default: Any
    parse: Callable[[Any], Any]
    doc: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value.strip()


def _queue(value: Any) -> str:
    name = _text(value)
    if not name.isprintable():
        raise ValueError("a name of printable characters")
    return name


def _choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return number

    return parse


def _whole(value: Any) -> int | None:
    """Return an integer, or what a short text of digits says; None for anything else."""
    if isinstance(value, str):
        digits = value.strip()
        is_one = len(digits) <= 20 and digits.isascii() and digits.removeprefix("-").isdigit()
        return int(digits) if is_one else None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _slots(value: Any) -> int | str:
    return "auto" if value == "auto" else _integer(1, 64)(value)


def _switch(value: Any) -> bool:
    """Parse a bool from the app's configuration, or a word from the environment."""
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("on or off")


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not low <= number <= high:
            raise ValueError(f"seconds from {low} to {high}")
        return number

    return parse


def _address(value: Any) -> tuple[str, int]:
    """Parse "127.0.0.1:8080", ":8080" (every interface) or "[::1]:8080"."""
    host, separator, text = value.strip().rpartition(":") if isinstance(value, str) else ("", "", "")
    port = _whole(text)
    if not separator or port is None or not 0 <= port <= 65_535:
        raise ValueError("host:port, like 127.0.0.1:8080")
    return host.strip("[]"), port


def _resolutions(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Parse "512x512,768x512" (height x width), or a sequence of pairs; empty or None for the checkpoint's own."""
    wanted = f"heights x widths in multiples of {SIDE_MULTIPLE}, like '512x512,768x512' or [(512, 512)]"
    if value is None or value == "":
        return None
    try:
        pairs = [part.lower().split("x") for part in value.split(",")] if isinstance(value, str) else value
        sizes = tuple((int(height), int(width)) for height, width in pairs)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(wanted) from None
    if not sizes or any(not 0 < side <= MAX_SIDE or side % SIDE_MULTIPLE for size in sizes for side in size):
        raise ValueError(wanted)
    return sizes


SETTINGS = (
    Setting(
        "sdtpu_model", "embedded", _text,
        "checkpoint: folder or hub name in the diffusers layout, msgpack or safetensors; `embedded` is the shipped one",
    ),
    Setting("sdtpu_revision", "main", _text,
            "branch, tag or commit of a hub checkpoint (many keep Flax weights in `bf16`)"),
    Setting(
        "sdtpu_platform", "auto", _choice("auto", "tpu", "gpu", "cpu"),
        "devices to run on; `auto` takes what is there and says so, the others refuse to start without it",
    ),
    Setting("sdtpu_cpu_devices", 8, _integer(1, 64), "how many devices to simulate when running on the CPU"),
    Setting("sdtpu_dtype", "auto", _choice("auto", "bfloat16", "float32"),
            "computation; `auto` is bfloat16 on an accelerator and float32 on the CPU"),
    Setting("sdtpu_slots_per_device", 1, _slots,
            "jobs that one device denoises at the same time; `auto` measures 1, 2, 4 and 8 once and keeps the best"),
    Setting("sdtpu_resolutions", None, _resolutions,
            "sizes to serve, height x width in pixels, like `512x512,768x512`; default: the checkpoint's own"),
    Setting("sdtpu_tick_s", 0.1, _seconds(0.001, 60),
            "seconds of device work per dispatch; jobs join and leave in between"),
    Setting("sdtpu_preemption", True, _switch,
            "on: a job may take the slot of one of lower priority, which resumes later where it was"),
    Setting("sdtpu_progress_s", 0.5, _seconds(0, 3600),
            "seconds between two PROGRESS states of a job; 0 for none"),
    Setting("sdtpu_preview_every", 0, _integer(0, 1000),
            "steps between two small previews in the PROGRESS state; 0 for none"),
    Setting("sdtpu_trace", None, _text,
            "file for a timeline of the run, in Chrome's trace format (Perfetto opens it)"),
    Setting("sdtpu_queue", DEFAULT_QUEUE, _queue, "queue of the task `sdtpu.generate`"),
    Setting("sdtpu_tenant_shards", 16, _integer(0, 256),
            "queues that jobs with a `tenant` are spread over, served in turn; 0 for one queue for all"),
    Setting("sdtpu_max_queue", 0, _integer(0, 10**9),
            "jobs that may wait in a queue before `delay()` raises QueueFull; 0 for no limit"),
    Setting("sdtpu_max_message_bytes", 262_144, _integer(4096, 2**27),
            "size of a task message, checked before it is parsed; a larger one is put aside"),
    Setting("sdtpu_lease_s", 30.0, _seconds(1, 86_400),
            "seconds after which the jobs of a worker that died go to another one"),
    Setting("sdtpu_stall_s", 60.0, _seconds(1, 86_400),
            "seconds that a tick may be late before the device counts as hung: its jobs go to another worker"),
    Setting("sdtpu_grace_s", 25.0, _seconds(0, 86_400),
            "seconds after SIGTERM to finish jobs in; the others are handed over where they are"),
    Setting("sdtpu_max_deliveries", 3, _integer(1, 1000),
            "workers that may die with a job on their devices before it fails with DeliveryLimitExceeded"),
    Setting("sdtpu_health_address", None, _address,
            "`host:port` that answers `/livez` and `/readyz`; default: none"),
    Setting("sdtpu_log_prompts", False, _switch, "on: logs may hold prompts; off: only at level DEBUG"),
    Setting(
        "sdtpu_image_store", "redis", _text,
        "where images go: `redis` is the result backend's Redis, with the result's expiry; else a `redis://` URL"
        " or any fsspec URL (`file:///…`, `gs://…`, `s3://…`)",
    ),
    Setting("sdtpu_compile_cache", "auto", _text,
            "folder of JAX's persistent compilation cache; `auto` is `~/.cache/sdtpu_worker/xla`, `off` for none"),
)  # fmt: skip
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Config:
    """The settings' values, one attribute each, without the `sdtpu_` prefix."""

    model: str
    revision: str
    platform: str
    cpu_devices: int
    dtype: str
    slots_per_device: int | str
    resolutions: tuple[tuple[int, int], ...] | None
    tick_s: float
    preemption: bool
    progress_s: float
    preview_every: int
    trace: str | None
    queue: str
    tenant_shards: int
    max_queue: int
    max_message_bytes: int
    lease_s: float
    stall_s: float
    grace_s: float
    max_deliveries: int
    health_address: tuple[str, int] | None
    log_prompts: bool
    image_store: str
    compile_cache: str


def read_setting(name: str, conf: Mapping[str, Any]) -> Any:
    """Return one setting's value from the environment, the app's configuration or the default.

    Raises:
        ConfigurationError: the value is not allowed.
    """
    setting = _BY_NAME[name]
    variable = name.upper()
    raw, source = (os.environ[variable], variable) if variable in os.environ else (conf.get(name), name)
    if raw is None:
        return setting.default
    try:
        return setting.parse(raw)
    except ValueError as exc:
        raise ConfigurationError(f"{source} must be {exc}, got {show(raw)}") from exc


def read_config(conf: Mapping[str, Any]) -> Config:
    """Return all settings.

    Args:
        conf: a Celery app's `conf`, or any mapping with `sdtpu_*` keys.

    Raises:
        ConfigurationError: a value is not allowed, or a key that starts with `sdtpu_` is not a setting.
    """
    prefix = getattr(conf, "prefix", None) or ""  # CELERY_ with Django's `namespace="CELERY"`
    for key in map(str, conf):
        name = key.removeprefix(prefix).lower() if prefix and key.startswith(prefix) else key
        if name.lower().startswith("sdtpu_") and name not in _BY_NAME:
            right = f"{prefix}{name.upper()}" if prefix else name.lower()
            known = f"write {right}" if name.lower() in _BY_NAME else f"the settings are {', '.join(_BY_NAME)}"
            raise ConfigurationError(f"unknown setting {key} in the app's configuration; {known}")
    return Config(**{name.removeprefix("sdtpu_"): read_setting(name, conf) for name in _BY_NAME})
