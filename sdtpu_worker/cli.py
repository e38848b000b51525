"""The command line: `sdtpu …`, also reachable as `celery sdtpu …`."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("sdtpu")
def sdtpu() -> None:
    """Image generation on a TPU host, behind Celery."""


@sdtpu.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("sdtpu-demo"), show_default=True,
              help="Folder for the images, grid.png, results.json and the worker's log.")  # fmt: skip
@click.option(
    "--prompt", "prompts", multiple=True, help="A prompt of yours; repeat the option for more. Default: 24 prompts."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=30, show_default=True, help="Denoising steps.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first image.")
@click.option("--devices", type=click.IntRange(1, 64), default=8, show_default=True, help="Simulated CPU devices.")
@click.option("--slots-per-device", type=click.IntRange(1, 64), default=1, show_default=True, help="Slots per device.")
def demo(out: Path, prompts: tuple[str, ...], steps: int, seed: int, devices: int, slots_per_device: int) -> None:
    """Run everything on this machine: a private Redis, a worker on simulated devices, 24 prompts."""
    from sdtpu_worker.demo.command import DemoFailed, run_demo

    try:
        run_demo(out, list(prompts), steps, seed, devices, slots_per_device)
    except DemoFailed as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        raise click.ClickException("stopped") from None


@sdtpu.command()
def settings() -> None:
    """List every setting with its default, its environment variable and what it does."""
    from sdtpu_worker.config import SETTINGS

    for setting in SETTINGS:
        default = "not set" if setting.default in (None, ()) else setting.default
        click.echo(f"{setting.name}  (default: {default}; environment: {setting.name.upper()})\n    {setting.doc}.")


@sdtpu.command()
@click.option("--ready", is_flag=True, help="Ask whether the worker takes jobs, not only whether it is alive.")
@click.option("--address", metavar="HOST:PORT", envvar="SDTPU_HEALTH_ADDRESS", show_envvar=True,
              help="Where the worker answers, as in sdtpu_health_address.")  # fmt: skip
def health(ready: bool, address: str | None) -> None:
    """Ask the worker on this machine for its health: one check per line, exit code 0 or 1."""
    from sdtpu_worker.config import SETTINGS
    from sdtpu_worker.operations.health_http import ask_health

    if not address:
        raise click.ClickException(
            "no address to ask: give --address, or set SDTPU_HEALTH_ADDRESS to the worker's sdtpu_health_address"
        )
    parse = next(setting.parse for setting in SETTINGS if setting.name == "sdtpu_health_address")
    try:
        ok, checks = ask_health(parse(address), "/readyz" if ready else "/livez")
    except ValueError as exc:
        raise click.ClickException(f"--address must be {exc}, got {address!r}") from exc
    except ConnectionError as exc:
        raise click.ClickException(str(exc)) from exc
    for check in checks:
        click.echo(f"{'ok' if check.ok else 'FAILING'}  {check.name}: {check.detail}")
    raise SystemExit(0 if ok else 1)
