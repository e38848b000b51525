"""`sdtpu check`: one line for each thing that has to be right, with the remedy where it is not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdtpu_worker.commands.options import app_option, find_app, json_option

if TYPE_CHECKING:
    from celery import Celery

_DEVICES_S = 120
_ASK_JAX = "import jax; devices = jax.devices(); print(len(devices), devices[0].platform, devices[0].device_kind)"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing; a warning is well for now."""

    name: str
    level: str
    detail: str


@click.command()
@app_option
@json_option
def check(app_path: str | None, as_json: bool) -> None:
    """Look at the configuration, Redis, the image store, the hosts, the checkpoint and this machine's devices.

    Exit code 1 where something fails; warnings do not count.
    """
    findings = list(_find_all(find_app(app_path)))
    ok = not any(finding.level == "FAILING" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            click.echo(f"{finding.level:8}{finding.name}: {finding.detail}")
    raise SystemExit(0 if ok else 1)


def _find_all(app: Celery) -> Iterator[Finding]:
    checks: dict[str, Callable[[Any], Iterator[tuple[str, str]]]] = {
        "settings": _settings,
        "broker": _broker,
        "results": _results,
        "images": _images,
        "hosts": _hosts,
        "checkpoint": _checkpoint,
        "devices": _devices,
    }
    for name, find in checks.items():
        try:
            for level, detail in find(app):
                yield Finding(name, level, detail)
        except Exception as exc:  # whatever it is, the other checks are made too
            yield Finding(name, "FAILING", _words(exc))


def _settings(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.config import read_config, source_of
    from sdtpu_worker.settings_table import SETTINGS

    read_config(app.conf)
    written = [setting.name for setting in SETTINGS if source_of(setting.name, app.conf)[1]]
    yield "ok", f"{len(written)} of {len(SETTINGS)} are set{': ' if written else ''}{', '.join(written)}"


def _broker(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.client.queue_state import broker_with_prefix
    from sdtpu_worker.config import read_setting
    from sdtpu_worker.operations.redis_checks import redis_warnings
    from sdtpu_worker.redaction import without_password

    with broker_with_prefix(app) as (client, prefix):
        in_redis = read_setting("sdtpu_image_store", app.conf) == "redis"
        warnings = redis_warnings(client, images_in_redis=in_redis, prefix=prefix)
    yield "ok", f"Redis answers at {without_password(app.conf.broker_url)}"
    for warning in warnings:
        yield "warning", warning


def _results(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.operations.result_checks import check_results
    from sdtpu_worker.redaction import without_password

    check_results(app)
    yield "ok", f"results can be stored at {without_password(app.conf.result_backend)}"


def _images(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.config import read_setting
    from sdtpu_worker.errors import ConfigurationError
    from sdtpu_worker.images.store import make_image_store
    from sdtpu_worker.redaction import sanitize_url

    url = read_setting("sdtpu_image_store", app.conf)
    try:
        make_image_store(app, url)
    except ConfigurationError as exc:
        yield "warning", f"{exc}; a client need not write there, a worker must"
    else:
        yield "ok", f"pictures can be stored at {sanitize_url(url)}"


def _hosts(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.client.queue_state import read_broker

    hosts = read_broker(app).workers
    if hosts:
        yield "ok", f"{len(hosts)} with {sum(host.num_slots for host in hosts)} slots take jobs"
    else:
        yield "warning", "none takes jobs: start one with `celery -A APP worker --queues sdtpu`"


def _checkpoint(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.config import read_setting

    model = read_setting("sdtpu_model", app.conf)
    path = Path(model).expanduser()
    if model == "embedded":
        yield "ok", "the small one that the package brings"
    elif path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"{model} has no model_index.json; sdtpu_model must be in the diffusers layout")
        yield "ok", f"the folder {model}"
    elif path.is_file():
        yield "ok", f"the file {model}"
    elif model.startswith(("/", ".", "~")):
        yield "warning", f"{model} is not on this machine; it has to be where the workers run"
    else:
        yield "ok", f"{model} from the hub; it is looked at when a worker starts"


def _devices(app: Celery) -> Iterator[tuple[str, str]]:
    from sdtpu_worker.config import read_setting

    if importlib.util.find_spec("jax") is None:
        yield "ok", "none needed here: without JAX this machine is a client"
        return
    platform = read_setting("sdtpu_platform", app.conf)
    env = dict(os.environ)
    if platform != "auto":
        env["JAX_PLATFORMS"] = "cuda" if platform == "gpu" else platform
    run = subprocess.run(
        [sys.executable, "-c", _ASK_JAX], env=env, capture_output=True, text=True, timeout=_DEVICES_S, check=False
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [""]
        raise ValueError(f"JAX finds no devices (sdtpu_platform is {platform}): {last[0]:.300}; a worker's host needs"
                         f" sdtpu_worker[{platform if platform in ('tpu', 'gpu') else 'worker'}] installed, and such"
                         " devices that no other process holds")  # fmt: skip
    number, found, kind = run.stdout.strip().split(" ", 2)
    simulated = f", as {read_setting('sdtpu_cpu_devices', app.conf)} simulated ones" if found == "cpu" else ""
    yield "ok", f"{number} of platform {found} ({kind}){simulated}"


def _words(exc: Exception) -> str:
    from sdtpu_worker.redaction import sanitize_url

    return sanitize_url(" ".join(str(exc).split()) or type(exc).__name__)
