"""Every `sdtpu_*` setting, in one table: name, default, parser and documentation.

A setting is read from the environment (its name in upper case), else from the Celery app's configuration (in lower
case), else it has its default. Since the environment comes first, one container image can be configured where it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtpu_worker.contract.queues import DEFAULT_QUEUE
from sdtpu_worker.contract.request import MAX_SIDE, SIDE_MULTIPLE
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import brief, sanitize_url, without_passwords


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: as in the app's configuration.
        default: its value where it is not set.
        parse: returns the value of a string from the environment, or of an object from the app's configuration. Raises
            ValueError with the words for what is allowed.
        doc: what it does, in sentences; the last one without its full stop.
    """

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
    """Return an integer: `value` itself, or the number in a short text of digits; None for anything else."""
    if isinstance(value, str):
        digits = value.strip()
        is_one = len(digits) <= 20 and digits.isascii() and digits.removeprefix("-").isdigit()
        return int(digits) if is_one else None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _slots(value: Any) -> int | str:
    try:
        return "auto" if value == "auto" else _integer(1, 64)(value)
    except ValueError as exc:
        raise ValueError(f"auto, or {exc}") from None


def _switch(value: Any) -> bool:
    """Return a bool: one from the app's configuration, or a word from the environment."""
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
    """Return host and port of "127.0.0.1:8080", ":8080" (every interface) or "[::1]:8080"."""
    host, separator, text = value.strip().rpartition(":") if isinstance(value, str) else ("", "", "")
    port = _whole(text)
    if not separator or port is None or not 0 <= port <= 65_535:
        raise ValueError("host:port, like 127.0.0.1:8080")
    return host.strip("[]"), port


def _resolutions(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Return the sizes of "512x512,768x512" (height x width) or of a sequence of pairs; None where it is empty."""
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


def _urls(value: Any) -> tuple[str, ...]:
    """Return the URLs in "redis,file:///srv/old" or in a list, each once; none for an empty one."""
    urls = value.split(",") if isinstance(value, str) else value
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        raise ValueError("a list of `redis`, redis:// URLs and fsspec URLs, or one string with commas between them")
    return tuple(dict.fromkeys(url.strip() for url in urls if url.strip()))


SETTINGS = (
    Setting(
        "sdtpu_model", "embedded", _text,
        "The checkpoint to serve: a folder, or a repository on the Hugging Face hub, in the diffusers layout with"
        " weights in msgpack or safetensors. `embedded` is the small checkpoint that the package brings",
    ),
    Setting(
        "sdtpu_revision", "main", _text,
        "The branch, tag or commit of a checkpoint from the hub; many repositories keep their Flax weights in the"
        " branch `bf16`. A checkpoint in a folder has none",
    ),
    Setting(
        "sdtpu_guidance", "auto", _choice("auto", "on", "off"),
        "Whether every job has a row in the batch for its negative prompt, without which guidance scales above 1 are"
        " refused and a step costs half. `auto`: as the checkpoint needs; distilled ones need none",
    ),
    Setting(
        "sdtpu_platform", "auto", _choice("auto", "tpu", "gpu", "cpu"),
        "The devices to run on. With `tpu`, `gpu` or `cpu` the worker does not start without such devices; `auto` takes"
        " the devices that JAX finds, and logs them",
    ),
    Setting(
        "sdtpu_cpu_devices", 8, _integer(1, 64),
        "The number of devices that a worker on the CPU simulates; other platforms ignore it",
    ),
    Setting(
        "sdtpu_dtype", "auto", _choice("auto", "bfloat16", "float32"),
        "The number format that the devices compute in. `auto` is bfloat16 on an accelerator and float32 on the CPU",
    ),
    Setting(
        "sdtpu_slots_per_device", 1, _slots,
        "How many jobs one device denoises at the same time. `auto` measures 1, 2, 4 and 8 at the first start and keeps"
        " the best number for later starts",
    ),
    Setting(
        "sdtpu_resolutions", None, _resolutions,
        "The image sizes to serve, height x width in pixels. Not set, only the checkpoint's own size is served; a job"
        " of a size that is not served fails with `InvalidRequest`",
    ),
    Setting(
        "sdtpu_tick_s", 0.1, _seconds(0.001, 60),
        "How many seconds of device work one dispatch holds, at least one denoising step. Jobs join and leave between"
        " two dispatches, so a shorter tick reacts sooner and a longer one costs the host less",
    ),
    Setting(
        "sdtpu_preemption", True, _switch,
        "Whether a job may take the slot of a less urgent one, which is parked and resumes later at the same step. When"
        " it is off, every job keeps its slot to its end",
    ),
    Setting(
        "sdtpu_progress_s", 0.5, _seconds(0, 3600),
        "Seconds between two PROGRESS states of a running job; 0 publishes none",
    ),
    Setting(
        "sdtpu_preview_every", 0, _integer(0, 1000),
        "How many denoising steps lie between two small previews in the PROGRESS state; 0 makes none",
    ),
    Setting(
        "sdtpu_trace", None, _text,
        "The file to which the worker writes a timeline of its ticks and jobs, in Chrome's trace format, which Perfetto"
        " opens. Not set, no timeline is written",
    ),
    Setting(
        "sdtpu_queue", DEFAULT_QUEUE, _queue,
        "The queue of the task `sdtpu.generate`; clients and workers must have the same name",
    ),
    Setting(
        "sdtpu_tenant_shards", 16, _integer(0, 256),
        "How many queues the jobs with a `tenant` are spread over; a worker serves the queues in turn. With 0 all jobs"
        " share one queue. Clients and workers must have the same number",
    ),
    Setting(
        "sdtpu_max_queue", 0, _integer(0, 10**9),
        "How many jobs of the same or a higher urgency may wait in a job's queue before `delay()` raises `QueueFull`; 0"
        " sets no limit",
    ),
    Setting(
        "sdtpu_max_message_bytes", 262_144, _integer(4096, 2**27),
        "The largest task message, in bytes, that the worker reads. A larger one is dead-lettered, and its job fails"
        " with `InvalidMessage` where its task id can be read",
    ),
    Setting(
        "sdtpu_lease_s", 30.0, _seconds(1, 86_400),
        "Seconds that a message stays with its worker without renewal. When a worker dies, its messages are redelivered"
        " after this time; when Redis does not answer for longer, `/livez` fails",
    ),
    Setting(
        "sdtpu_stall_s", 60.0, _seconds(1, 86_400),
        "Seconds that a tick may be late before its devices count as hung: the leases are then not renewed, and other"
        " workers get the jobs",
    ),
    Setting(
        "sdtpu_grace_s", 25.0, _seconds(0, 86_400),
        "Seconds after SIGTERM in which the worker finishes its jobs. It hands over the jobs that need longer; with 0"
        " it hands over all of them at once",
    ),
    Setting(
        "sdtpu_max_deliveries", 3, _integer(1, 1000),
        "How many workers may die, hang or lose their devices with a job on them before the job fails with"
        " `DeliveryLimitExceeded`",
    ),
    Setting(
        "sdtpu_health_address", None, _address,
        "The address, `host:port`, at which the worker answers `/livez` and `/readyz`. An empty host means every"
        " interface, port 0 any free port; not set, the worker does not listen",
    ),
    Setting(
        "sdtpu_log_prompts", False, _switch,
        "Whether log lines may hold prompts. When it is off, only lines at level DEBUG may",
    ),
    Setting(
        "sdtpu_image_store", "redis", _text,
        "Where the worker stores images: `redis` for the result backend's Redis, with the expiry of the results; or a"
        " `redis://` URL; or an fsspec URL (`file:///…`, `gs://…`, `s3://…`). Clients read from the same place",
    ),
    Setting(
        "sdtpu_read_image_stores", (), _urls,
        "Further stores to read images from, such as the one before `sdtpu_image_store` was changed: each as for"
        " `sdtpu_image_store`, in a list, or in one string with commas between them. An image anywhere else is refused",
    ),
    Setting(
        "sdtpu_compile_cache", "auto", _text,
        "The folder of JAX's persistent compilation cache. `auto` is `~/.cache/sdtpu_worker/xla`; with `off` every"
        " start compiles anew",
    ),
)  # fmt: skip
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Config:
    """The values of all settings, one attribute each, named without `sdtpu_`."""

    model: str
    revision: str
    guidance: str
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
    image_store: str = field(repr=False)  # this and the next may hold passwords
    read_image_stores: tuple[str, ...] = field(repr=False)
    compile_cache: str


def read_setting(name: str, conf: Mapping[str, Any]) -> Any:
    """Return one setting's value: from the environment, else from the app's configuration, else the default.

    Args:
        name: the setting.
        conf: a Celery app's `conf`, or any mapping with `sdtpu_*` keys.

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
        raise ConfigurationError(f"{source} must be {exc}, got {sanitize_url(brief(raw))}") from exc


def source_of(name: str, conf: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a setting's value as it was written, without passwords, and who wrote it; None and "" for nobody.

    Args:
        name: the setting.
        conf: a Celery app's `conf`, or any mapping with `sdtpu_*` keys.
    """
    if (variable := name.upper()) in os.environ:
        return without_passwords(os.environ[variable]), variable
    value = conf.get(name)
    return without_passwords(value), "" if value is None else "the app's configuration"


def read_config(conf: Mapping[str, Any]) -> Config:
    """Return the values of all settings.

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
