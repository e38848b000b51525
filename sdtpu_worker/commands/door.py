"""`sdtpu serve` and `sdtpu key`."""

from __future__ import annotations

import click

from sdtpu_worker.commands.options import app_option, clear_errors, find_client_app, parse_address


@click.command()
@app_option
@click.option("--address", metavar="HOST:PORT", help="Where to listen. Default: sdtpu_http_address, 127.0.0.1:8090.")
def serve(app_path: str | None, address: str | None) -> None:
    """Serve pictures over HTTP: OpenAI's Images API, jobs with live events, and the web UI's API."""
    try:
        from sdtpu_worker.http.serve import serve as serve_door
    except ModuleNotFoundError as exc:
        raise click.ClickException(f"{exc}; install the extra: pip install 'sdtpu_worker[http]'") from exc
    try:
        with clear_errors():
            serve_door(find_client_app(app_path), parse_address(address) if address else None)
    except KeyboardInterrupt:
        raise click.ClickException("stopped") from None


@click.command()
@click.argument("name")
@click.option("--priority", metavar="LOW-HIGH", help="The priorities that the caller may ask for. Default: 0-9.")
@click.option("--max-jobs", type=click.IntRange(1), help="How many unfinished jobs it may have. Default: any number.")
def key(name: str, priority: str | None, max_jobs: int | None) -> None:
    """Make a key for a caller of the door, and the line for sdtpu_http_keys, which has its hash only.

    For whoever scrapes the door's /metrics put the line into sdtpu_http_metrics_keys instead.
    """
    from sdtpu_worker.config_values import parse_http_keys
    from sdtpu_worker.http.keys import hash_key, new_key

    secret = new_key()
    line = ":".join([name, hash_key(secret), *([priority] if priority else []), *([str(max_jobs)] if max_jobs else [])])
    try:
        parse_http_keys(line)
    except ValueError as exc:
        raise click.ClickException(f"NAME, --priority and --max-jobs must make {exc}, got {line!r}") from exc
    click.echo(f"the caller's key, shown only now: {secret}")
    click.echo(f"for sdtpu_http_keys: {line}")
