"""`sdtpu compile`: a worker's programs made before it starts, for an image or a host without a compiler's minutes."""

from __future__ import annotations

import json

import click

from sdtpu_worker.commands.compiler import NO_FIT, compiling
from sdtpu_worker.commands.options import app_option, find_app, json_option


@click.command("compile")
@app_option
@click.option("--topology", metavar="CHIP[:LAYOUT]",
              help="The chips of one TPU host that is not here: v4, v5e, v5p or v6e, with a layout like 2x4, or a whole"
              " host. Default: the devices of this machine.")  # fmt: skip
@click.option("--force", is_flag=True, help="Also compile programs that are there.")
@json_option
def compile_command(app_path: str | None, topology: str | None, force: bool, as_json: bool) -> None:
    """Compile a worker's programs ahead, so that it loads them when it starts, and compiles nothing.

    Reads the settings that the worker will have, and of the checkpoint no weights. Writes to `sdtpu_programs`, else to
    the folder of `sdtpu_compile_cache`. Progress goes to stderr. Exit code 5 where a program does not fit the memory.
    """
    from sdtpu_worker.config import engine_settings, read_config
    from sdtpu_worker.planning.programs_ahead import NoRoom, make_programs

    with compiling():
        conf = find_app(app_path).conf
        read_config(conf)
        try:
            found = make_programs(engine_settings(conf), topology, force, lambda line: click.echo(line, err=True))
        except NoRoom as exc:
            click.echo(f"Error: {exc}", err=True)
            raise SystemExit(NO_FIT) from exc
    if as_json:
        click.echo(json.dumps(found))
        return
    made = [each for each in found["programs"] if not each["was_there"]]
    size = sum(each["bytes"] for each in found["programs"])
    click.echo(
        f"{len(found['programs'])} programs, {size / 2**20:.1f} MiB, {len(made)} of them made now, in {found['folder']}"
    )
    click.echo(
        f"for {found['num_devices']} devices of kind {found['device_kind']}, {found['slots_per_device']} slots each,"
        f" {', '.join(found['resolutions'])}, {found['dtype']}; fingerprint {found['fingerprint']}"
    )
