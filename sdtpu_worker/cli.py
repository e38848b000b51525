"""The command line: `sdtpu …`, also reachable as `celery sdtpu …`."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import click

from sdtpu_worker.commands.check import check
from sdtpu_worker.commands.compile import compile_command
from sdtpu_worker.commands.door import key, serve
from sdtpu_worker.commands.jobs import cancel, generate, status
from sdtpu_worker.commands.options import app_option, clear_errors, find_app, find_client_app, parse_address
from sdtpu_worker.commands.plan import plan
from sdtpu_worker.commands.queue import queue
from sdtpu_worker.commands.signals import signals_handled_by


@click.group("sdtpu")
def sdtpu() -> None:
    """Image generation on a TPU host, behind Celery."""


for command in (generate, status, cancel, queue, check, plan, compile_command, serve, key):
    sdtpu.add_command(command)


@sdtpu.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("sdtpu-demo"), show_default=True,
              help="Folder for the images, grid.png, results.json and the worker's log.")  # fmt: skip
@click.option(
    "--prompt", "prompts", multiple=True, help="A prompt of yours; repeat the option for more. Default: 24 prompts."
)
@click.option("--model", default="embedded", show_default=True, help="The checkpoint, as sdtpu_model.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps. Default: 30 with `embedded`, else the"
              " checkpoint's own.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first image.")
@click.option("--devices", type=click.IntRange(1, 64), default=8, show_default=True, help="Simulated CPU devices.")
@click.option("--slots-per-device", type=click.IntRange(1, 64), help="Slots per device. Default: 1, with --mix 3,"
              " with --web 2.")  # fmt: skip
@click.option("--web", is_flag=True, help="A page in your browser instead of prompts, until Ctrl-C; needs the extra"
              " `http`.")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="With --web: print the page's address only.")
@click.option("--mix", is_flag=True, help="24 jobs of all kinds in one batch: from text, from pictures, with masks,"
              " with the LoRA `outline` at several weights; many samplers, steps and guidance scales.")  # fmt: skip
def demo(
    out: Path,
    prompts: tuple[str, ...],
    model: str,
    steps: int | None,
    seed: int,
    devices: int,
    slots_per_device: int | None,
    web: bool,
    no_browser: bool,
    mix: bool,
) -> None:
    """Run everything on this machine: a private Redis, a worker on simulated devices, 24 prompts."""
    from sdtpu_worker.demo.command import DemoFailed, run_demo
    from sdtpu_worker.demo.web import run_web_demo

    if web and (mix or prompts or steps):
        raise click.ClickException("--mix, --prompt and --steps must be left out with --web: the page asks for them")
    if no_browser and not web:
        raise click.ClickException("--no-browser must come with --web")
    try:
        if web:
            # also where a shell has started this in its background, deaf to Ctrl-C
            with signals_handled_by(signal.default_int_handler, signal.SIGINT, signal.SIGTERM):
                run_web_demo(out, model, devices, slots_per_device, opens_browser=not no_browser)
            return
        run_demo(out, list(prompts), model, steps, seed, devices, slots_per_device, mix)
    except DemoFailed as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        raise click.ClickException("stopped") from None


@sdtpu.command()
@app_option
def settings(app_path: str | None) -> None:
    """List every setting with its default, its environment variable, what it does, and its value where it is set."""
    from sdtpu_worker.config import source_of
    from sdtpu_worker.settings_table import SETTINGS

    conf = find_app(app_path).conf
    for setting in SETTINGS:
        default = "not set" if setting.default in (None, ()) else setting.default
        click.echo(f"{setting.name}  (default: {default}; environment: {setting.name.upper()})\n    {setting.doc}.")
        value, source = source_of(setting.name, conf)
        if source:
            click.echo(f"    Now {value!r}, from {source}.")


@sdtpu.command()
@app_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for an autoscaler.")
def queues(app_path: str | None, as_json: bool) -> None:
    """Say how many jobs wait in each of the task's queues, by priority, and how many workers hold."""
    from sdtpu_worker.client.queue_state import read_queues

    with clear_errors():
        states = read_queues(find_client_app(app_path))
    totals = {
        "waiting": sum(sum(state.waiting.values()) for state in states),
        "held": sum(state.held for state in states),
        "deferred": sum(state.deferred for state in states),
        "load": sum(state.load for state in states),
    }
    if as_json:
        by_queue = {
            state.queue: {"waiting": state.waiting, "held": state.held, "deferred": state.deferred} for state in states
        }
        click.echo(json.dumps({**totals, "queues": by_queue}))
        return
    for state in states:
        if state.load or state.deferred:
            bands = ", ".join(f"priority {band}: {count}" for band, count in state.waiting.items() if count)
            click.echo(
                f"{state.queue}: {sum(state.waiting.values())} waiting{f' ({bands})' if bands else ''},"
                f" {state.held} held, {state.deferred} deferred"
            )
    click.echo(
        f"all {len(states)} queues: {totals['waiting']} waiting + {totals['held']} held = {totals['load']},"
        f" {totals['deferred']} deferred"
    )


@sdtpu.command()
@app_option
@click.option("--listen", metavar="HOST:PORT", help="Answer `/metrics` there until stopped, instead of printing once.")
def metrics(app_path: str | None, listen: str | None) -> None:
    """Print what Redis knows of the queues and the workers, in Prometheus' text format; no worker has to run."""
    from sdtpu_worker.client.queue_figures import read_figures

    try:
        from sdtpu_worker.operations.exposition import expose_queues
    except ImportError as exc:
        raise click.ClickException(f"{exc}: pip install 'sdtpu_worker[metrics]'") from exc
    app = find_client_app(app_path)
    with clear_errors():
        if listen:
            _serve_metrics(listen, lambda accept: expose_queues(read_figures(app), accept))
        else:
            click.echo(expose_queues(read_figures(app))[1].decode(), nl=False)


@sdtpu.command()
@app_option
@click.confirmation_option("-f", "--force", prompt="Delete all waiting and deferred jobs of all tenants?")
def purge(app_path: str | None) -> None:
    """Delete the jobs that wait, those of all tenants and priorities, and those that wait for their time.

    Jobs that workers hold continue. Deleted jobs stay PENDING.
    """
    from sdtpu_worker.client.queue_state import purge_queues

    with clear_errors():
        deleted = purge_queues(find_client_app(app_path))
    click.echo(f"{deleted} jobs deleted")


@sdtpu.command()
@click.option("--ready", is_flag=True, help="Ask whether the worker takes jobs, not only whether it is alive.")
@click.option("--address", metavar="HOST:PORT", envvar="SDTPU_HEALTH_ADDRESS", show_envvar=True,
              help="Where the worker answers, as in sdtpu_health_address.")  # fmt: skip
def health(ready: bool, address: str | None) -> None:
    """Ask the worker on this machine for its health: one check per line, exit code 0 or 1."""
    from sdtpu_worker.operations.health_http import ask_health

    if not address:
        raise click.ClickException(
            "no address to ask: give --address, or set SDTPU_HEALTH_ADDRESS to the worker's sdtpu_health_address"
        )
    try:
        ok, checks = ask_health(parse_address(address), "/readyz" if ready else "/livez")
    except ConnectionError as exc:
        raise click.ClickException(str(exc)) from exc
    for each in checks:
        click.echo(f"{'ok' if each.ok else 'FAILING'}  {each.name}: {each.detail}")
    raise SystemExit(0 if ok else 1)


def _serve_metrics(listen: str, page: Callable[[str], tuple[str, bytes]]) -> None:
    """Answer `/metrics` until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: the address is in use, or does not belong to this host.
    """
    from sdtpu_worker.operations.health import Check
    from sdtpu_worker.operations.health_http import HealthServer, format_address

    def alive() -> list[Check]:
        return [Check("serving", True, "answers; whether Redis does, /metrics tells")]

    stopped = threading.Event()
    with signals_handled_by(lambda *_: stopped.set(), signal.SIGINT, signal.SIGTERM):
        server = HealthServer(parse_address(listen, "--listen"), alive, alive, {"/metrics": page}, "--listen")
        click.echo(f"metrics: http://{format_address(server.address)}/metrics")
        stopped.wait()
        server.close()
