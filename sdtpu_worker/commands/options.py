"""What several commands share: `--app`, `--json`, addresses, errors, and the codes with which they exit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from celery import Celery

FAILED, NOT_YET = 3, 4
"""Exit codes beside click's (0: well, 1: an error, 2: wrong usage): a job has no picture; it has not ended."""

app_option = click.option(
    "-A",
    "--app",
    "app_path",
    metavar="MODULE",
    help="Your Celery app. Default: that of `celery -A`, or the ready-made.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object in place of text.")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the command with one line and exit code 1 where the block raises an error of this package."""
    from sdtpu_worker.errors import SdtpuError

    try:
        yield
    except SdtpuError as exc:
        raise click.ClickException(str(exc)) from exc


def find_app(path: str | None) -> Celery:
    """Return the app that a command is about: that of its own option, of `celery -A`, or the ready-made one."""
    if path:
        from celery.app.utils import find_app

        try:
            return find_app(path)
        except (ImportError, AttributeError) as exc:
            raise click.ClickException(f"--app must name a module with a Celery app, got {path!r}: {exc}") from exc
    context = click.get_current_context().find_root().obj  # of Celery's own command line
    if app := getattr(context, "app", None):
        return app
    from sdtpu_worker.app import app as ready_made

    return ready_made


def find_client_app(path: str | None) -> Celery:
    """Return the app of `find_app`, for a command that speaks with its broker.

    Raises:
        ClickException: kombu has no transport for `broker_url`, or its driver is not installed.
    """
    from sdtpu_worker.redaction import without_password

    app = find_app(path)
    try:
        app.connection_for_write().get_transport_cls()
    except (KeyError, ImportError) as exc:
        url = without_password(app.conf.broker_write_url or app.conf.broker_url)
        raise click.ClickException(
            f"broker_url must be one that kombu can open, like redis://, got {url}: {exc.args[0]}"
        ) from exc
    return app


def parse_address(address: str, option: str = "--address") -> tuple[str, int]:
    """Return the host and the port that an option names."""
    from sdtpu_worker.config_values import parse_address

    try:
        return parse_address(address)
    except ValueError as exc:
        raise click.ClickException(f"{option} must be {exc}, got {address!r}") from exc
