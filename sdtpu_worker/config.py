"""The values of the `sdtpu_*` settings, whose table is `settings_table.py`.

A setting is read from the environment (its name in upper case), else from the Celery app's configuration (in lower
case), else it has its default. Since the environment comes first, one container image can be configured where it runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sdtpu_worker.config_values import HttpKey
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import MASK, brief, sanitize_url, without_passwords
from sdtpu_worker.settings_table import SETTINGS

_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Config:
    """The values of all settings, one attribute each, named without `sdtpu_`."""

    model: str
    revision: str
    tokenizer: str | None
    prediction_type: str
    loras_merged: tuple[tuple[str, float], ...]
    loras: Mapping[str, str] | str | None
    lora_rank: int
    embeddings: Mapping[str, str] | str | None
    prompt_windows: int
    guidance: str
    image_inputs: bool
    controlnets: Mapping[str, str]
    platform: str
    cpu_devices: int
    dtype: str
    slots_per_device: int | str
    resolutions: tuple[tuple[int, int], ...] | None
    vae_tiling: str
    attention: str
    tick_s: float
    preemption: bool
    reuse: str
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
    log_format: str
    image_store: str = field(repr=False)  # this and the next may hold passwords
    read_image_stores: tuple[str, ...] = field(repr=False)
    http_address: tuple[str, int]
    http_keys: tuple[HttpKey, ...] = field(repr=False)
    http_open: bool
    http_metrics_keys: tuple[HttpKey, ...] = field(repr=False)
    http_cors_origins: tuple[str, ...]
    http_webhook_origins: tuple[str, ...]
    http_webhook_secret: str | None = field(repr=False)
    http_max_body_bytes: int
    http_wait_s: float
    http_max_streams: int
    http_page: bool
    web_page: bool
    web_owner: str | None
    web_priorities: tuple[int, int]
    web_max_jobs: int
    web_max_streams: int
    web_stream_s: float
    compile_cache: str
    programs: str | None


_OF_ENGINE = (
    *("model", "revision", "tokenizer", "prediction_type", "loras_merged", "loras", "lora_rank", "embeddings"),
    *("prompt_windows", "guidance", "image_inputs", "controlnets", "platform", "cpu_devices", "dtype"),
    *("slots_per_device", "resolutions", "vae_tiling", "attention", "preview_every", "compile_cache", "programs"),
)


def engine_settings(conf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that decide a worker's programs, by the settings' names, as JSON can hold them.

    Args:
        conf: a Celery app's `conf`, or any mapping with `sdtpu_*` keys.

    Raises:
        ConfigurationError: a value is not allowed.
    """
    values = {f"sdtpu_{name}": read_setting(f"sdtpu_{name}", conf) for name in _OF_ENGINE}
    return {name: value for name, value in values.items() if value is not None}


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


def result_expires_s(conf: Mapping[str, Any]) -> int | None:
    """Return the seconds for which results are kept, Celery's `result_expires`; None for ever.

    Args:
        conf: the app's configuration.
    """
    expires = conf.get("result_expires")
    return int(expires.total_seconds() if isinstance(expires, timedelta) else expires or 0) or None


def source_of(name: str, conf: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a setting's value as it was written, without passwords, and who wrote it; None and "" for nobody.

    Args:
        name: the setting.
        conf: a Celery app's `conf`, or any mapping with `sdtpu_*` keys.
    """
    variable = name.upper()
    value: Any = os.environ.get(variable, conf.get(name))
    source = variable if variable in os.environ else "" if value is None else "the app's configuration"
    return (MASK if source and name.endswith("_secret") else without_passwords(value)), source


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
