"""`sdtpu plan`: what a model would cost on a TPU host, known before anyone rents one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from sdtpu_worker.commands.compiler import NO_FIT, compiling
from sdtpu_worker.commands.options import app_option, find_app, json_option

_SLOTS = (1, 2, 4, 8)
_GIB = 2**30
_SECONDS = {False: 900.0, True: 3600.0}
"""How long a compile may take by default, without and with --full: a busy machine takes several times its CPU time."""


def _slots(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "auto":
        return _SLOTS
    if re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", text) and all(int(each) <= 64 for each in text.split(",")):
        return tuple(sorted({int(each) for each in text.split(",")}))
    raise click.BadParameter(f"must be auto, or numbers from 1 to 64 like 4 or 1,4, got {text!r}")


def _resolution(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or not int(found[1]) or (found[2] and not int(found[2])):
        raise click.BadParameter(f"must be one number of pixels, or height x width like 768x512, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _finite(context: click.Context, parameter: click.Parameter, number: float | None) -> float | None:
    if number is not None and not math.isfinite(number):
        raise click.BadParameter(f"must be a finite number, got {number}")
    return number


def _steps(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text) and all(int(each) <= 1000 for each in text.split(",")):
        return tuple(int(each) for each in text.split(","))
    raise click.BadParameter(f"must be numbers from 1 to 1000 like 30 or 20,30,50, got {text!r}")


def _controlnets(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[tuple[str, str], ...] | None:
    from sdtpu_worker.errors import ConfigurationError
    from sdtpu_worker.planning.settings import parse_controlnets

    try:
        return None if text is None else parse_controlnets(text)
    except (ValueError, ConfigurationError) as exc:
        raise click.BadParameter(f"must be a number, or {exc}, got {text!r}") from exc


@click.command()
@app_option
@click.option("--model", metavar="NAME|FOLDER",
              help="sd15, sd21, sdxl, embedded, embedded-turbo, or a folder with a checkpoint's configs.")  # fmt: skip
@click.option("--topology", default="v5e:2x4", show_default=True, metavar="CHIP[:LAYOUT]",
              help="The chips of one host: v4, v5e, v5p or v6e, with a layout like 2x4, or a whole host.")  # fmt: skip
@click.option("--slots-per-device", "slots", callback=_slots, metavar="N[,N…]|auto",
              help="Which slot counts to compile; auto: 1, 2, 4 and 8, one after the other. Default: 4.")  # fmt: skip
@click.option("--resolution", callback=_resolution, metavar="SIDE|HEIGHTxWIDTH", help="Default: the model's own.")
@click.option("--guidance", type=click.Choice(["auto", "on", "off"]), help="off has no rows for negative prompts.")
@click.option("--prompt-windows", type=click.IntRange(1, 16), help="Windows that a prompt may have.")
@click.option("--image-inputs/--no-image-inputs", default=None, help="Whether jobs may start from pictures.")
@click.option("--controlnets", callback=_controlnets, metavar="NUMBER|NAME=FOLDER,…",
              help="A number: as many as they are usual for the model; or folders with their configs.")  # fmt: skip
@click.option("--lora-rank", type=click.IntRange(0, 256), help="Room for LoRAs of single jobs; 0: none.")
@click.option("--previews/--no-previews", default=None, help="Whether jobs show previews.")
@click.option("--vae-tiling", type=click.Choice(["auto", "on", "off"]), help="auto: only if it does not fit.")
@click.option("--attention", type=click.Choice(["auto", "plain", "packed"]))
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]))
@click.option("--full", is_flag=True, help="Wait for the generated code, and with it the compiler's own estimate.")
@click.option("--time-limit", type=click.FloatRange(1), callback=_finite,
              help="Seconds for each compile; then what is known counts. Default: 900, with --full 3600.")  # fmt: skip
@click.option("--memory-limit", type=click.FloatRange(0.5), default=12.0, show_default=True, callback=_finite,
              help="GiB of memory that the compiler may use on this machine.")  # fmt: skip
@click.option("--steps", default="30", show_default=True, callback=_steps, metavar="N[,N…]",
              help="Denoising steps of your jobs, for the best setting and the load.")  # fmt: skip
@click.option("--load", type=click.FloatRange(0, min_open=True), metavar="JOBS_PER_HOUR", callback=_finite,
              help="Find the hosts for this load, in a simulation.")  # fmt: skip
@click.option("--p99", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, callback=_finite,
              help="With --load: seconds that 99 of 100 jobs may take at most.")  # fmt: skip
@click.option("--price", type=click.FloatRange(0), callback=_finite,
              help="With --load: of a chip for an hour, in your currency.")  # fmt: skip
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path),
              help="Folder for compiled results. Default: the user's cache folder.")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Compile again, and keep nothing.")
@json_option
def plan(**options: Any) -> None:
    """Say what a model would cost on a TPU host, without one: memory, traffic, times, hosts and money.

    Compiles the worker's own programs for the host's chips, from shapes alone. Needs the extra `plan`; no network, no
    TPU and no weights. What no option says is as in the worker's settings: in the environment (SDTPU_…), in the app of
    --app, else their defaults. Progress goes to stderr. Exit code 5 where nothing that was compiled fits the memory.
    """
    from sdtpu_worker.planning.report import to_text

    with compiling():
        found = _make(options)
    click.echo(json.dumps(found) if options["as_json"] else to_text(found))
    raise SystemExit(0 if found["best_slots_per_device"] else NO_FIT)


def _make(options: dict[str, Any]) -> dict[str, Any]:
    from sdtpu_worker.planning.compile_ahead import Limits
    from sdtpu_worker.planning.plan import LoadWanted, make_plan
    from sdtpu_worker.planning.results_cache import ResultsCache, default_folder
    from sdtpu_worker.planning.settings import read_planned

    if options["price"] is not None and not options["load"]:
        raise click.UsageError("--price is for --load: give the jobs per hour that the hosts are to serve")
    seconds = options["time_limit"] or _SECONDS[options["full"]]
    return make_plan(
        read_planned(options, _settings(options["app_path"])),
        options["steps"],
        LoadWanted(options["load"], options["p99"]) if options["load"] else None,
        options["price"],
        Limits(options["full"], seconds, int(options["memory_limit"] * _GIB)),
        ResultsCache(None if options["no_cache"] else options["cache"] or default_folder()),
        lambda line: click.echo(line, err=True),
    )


def _settings(app_path: str | None) -> Mapping[str, Any]:
    """Return the configuration of the app that is named, here or to `celery -A`; without one, none."""
    if app_path or getattr(click.get_current_context().find_root().obj, "app", None):
        return cast("Mapping[str, Any]", find_app(app_path).conf)
    return {}
