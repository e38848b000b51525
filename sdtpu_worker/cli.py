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
@click.option("--prompt", "prompts", multiple=True, help="Your own prompt; repeat it for more. Default: 24 of ours.")
@click.option("--steps", type=click.IntRange(1, 1000), default=30, show_default=True, help="Denoising steps.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first image.")
@click.option("--devices", type=click.IntRange(1, 64), default=8, show_default=True, help="Simulated CPU devices.")
@click.option("--slots-per-device", type=click.IntRange(1, 64), default=1, show_default=True, help="Slots per device.")
def demo(out: Path, prompts: tuple[str, ...], steps: int, seed: int, devices: int, slots_per_device: int) -> None:
    """Run the whole thing on this machine: a private Redis, a worker on simulated devices, 24 prompts."""
    from sdtpu_worker.demo.command import DemoFailed, run_demo

    try:
        run_demo(out, list(prompts), steps, seed, devices, slots_per_device)
    except DemoFailed as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        raise click.ClickException("stopped") from None


@sdtpu.command()
def settings() -> None:
    """List every setting with its default and what it does."""
    from sdtpu_worker.config import SETTINGS

    for setting in SETTINGS:
        default = "not set" if setting.default is None else setting.default
        click.echo(f"{setting.name}  (default: {default}; environment: {setting.name.upper()})\n    {setting.doc}")
