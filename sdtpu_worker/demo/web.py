"""`sdtpu demo --web`: the page in a browser, on a private Redis, a worker on simulated devices and a door."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

import click

from sdtpu_worker.demo import mix
from sdtpu_worker.demo.command import START_TIMEOUT_S, DemoFailed, demo_worker
from sdtpu_worker.testing.processes import StartFailed, private_redis, running, wait_for_line, worker_env

_DOOR_TIMEOUT_S, _REPORT_TIMEOUT_S = 60.0, 15.0
_SETTINGS = {
    "SDTPU_PREVIEW_EVERY": "1",
    "SDTPU_PROGRESS_S": "0.1",
    **mix.SETTINGS,
}
"""What the page shows best: pictures that form before one's eyes, and a LoRA to choose."""


def run_web_demo(out: Path, model: str, devices: int, slots_per_device: int | None, opens_browser: bool) -> None:
    """Serve the page until a KeyboardInterrupt. Redis, the worker and the door have stopped when it returns or raises.

    Args:
        out: the folder for the logs; made if it does not exist.
        model: the checkpoint that the worker serves.
        devices: how many CPU devices the worker simulates.
        slots_per_device: jobs that one device denoises at the same time; None for 2.
        opens_browser: whether the browser is opened on the page.

    Raises:
        DemoFailed: a process did not start, or has ended by itself.
    """
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise DemoFailed("--web needs the door: pip install 'sdtpu_worker[demo]'")
    out.mkdir(parents=True, exist_ok=True)
    worker_log, door_log = out / "worker.log", out / "door.log"
    for log in (worker_log, door_log):
        log.unlink(missing_ok=True)
    settings = _SETTINGS if model == "embedded" else {n: v for n, v in _SETTINGS.items() if n not in mix.SETTINGS}
    try:
        with contextlib.ExitStack() as stack:
            click.echo("starting a private Redis …")
            redis_url = stack.enter_context(private_redis())
            click.echo(f"starting a worker on {devices} simulated devices (log: {worker_log}) …")
            slots = slots_per_device or 2
            worker = stack.enter_context(demo_worker(redis_url, worker_log, model, devices, slots, settings))
            command = [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "serve", "--address",
                       "127.0.0.1:0"]  # fmt: skip
            door = stack.enter_context(running(command, door_log, env=worker_env(redis_url)))
            line = wait_for_line(worker, worker_log, "ready: ", START_TIMEOUT_S)
            click.echo(re.sub(r"^.*(?=ready:)", "", line))
            wait_for_line(worker, worker_log, " ready.", START_TIMEOUT_S)
            place = re.search(r"http://\S+(?=,)", wait_for_line(door, door_log, "door: http://", _DOOR_TIMEOUT_S))
            wait_for_line(door, door_log, "Application startup complete", _DOOR_TIMEOUT_S)
            assert place is not None
            _wait_for_worker(place[0])
            click.echo(f"\nthe page: {place[0]}/\nCtrl-C ends everything")
            if opens_browser:
                webbrowser.open(f"{place[0]}/")
            door.wait()
            raise DemoFailed(f"the door has ended with code {door.returncode}; see {door_log}")
    except StartFailed as exc:
        raise DemoFailed(str(exc)) from exc
    except KeyboardInterrupt:
        click.echo("\nstopped")


def _wait_for_worker(door: str) -> None:
    """Return when the door knows what the worker serves, so that nobody is told that there is none."""
    loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _REPORT_TIMEOUT_S
    while time.monotonic() < deadline:
        with loopback.open(f"{door}/v1/jobs/capabilities", timeout=_REPORT_TIMEOUT_S) as answer:
            if json.load(answer)["workers"]:
                return
        time.sleep(0.2)
