"""`sdtpu generate`, `sdtpu status` and `sdtpu cancel`: jobs from a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdtpu_worker.commands.options import FAILED, NOT_YET, app_option, clear_errors, find_client_app, json_option

if TYPE_CHECKING:
    from celery import Celery

    from sdtpu_worker.web.job_state import JobState

_POLL_S = 0.2
_SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@click.command()
@app_option
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Folder for the"
              " pictures, named by their jobs. Default: this one.")  # fmt: skip
@click.option("--n", type=click.IntRange(1, 1000), default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--negative-prompt", help="What the pictures should not show.")
@click.option("--prompt-syntax", type=click.Choice(["plain", "weighted"]), help="weighted: (word:1.3), [word] and BREAK"
              " are read as A1111's web UI reads them.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of the first picture; the next ones have the next seeds.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps. Default: the checkpoint's own.")
@click.option("--guidance-scale", type=float, help="Default: the checkpoint's own.")
@click.option("--sampler", help="Default: the checkpoint's own.")
@click.option("--size", metavar="WIDTHxHEIGHT", help="In pixels. Default: the checkpoint's own.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A picture to start from.")
@click.option("--mask-image", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another picture:"
              " where it is light, the first is drawn again.")  # fmt: skip
@click.option("--strength", type=float, help="How much of the picture is given up, above 0 to 1.")
@click.option("--format", "image_format", type=click.Choice(["png", "jpeg", "webp"]), default="png", show_default=True)
@click.option("--priority", type=click.IntRange(0, 9), help="Lower is more urgent.")
@json_option
def generate(
    app_path: str | None, prompts: tuple[str, ...], out: Path, n: int, size: str | None, seed: int | None,
    steps: int | None, as_json: bool, priority: int | None, **more: Any,
) -> None:  # fmt: skip
    """Make pictures: enqueue a job for each, wait, and save them. Ctrl-C cancels what is not done."""
    from sdtpu_worker.client.stored_state import lasting_backend

    app = find_client_app(app_path)
    parameters = {name: value for name, value in more.items() if value is not None} | _read_size(size)
    if steps is not None:
        parameters["num_inference_steps"] = steps
    if seed is not None:
        parameters["seed"] = seed
    ids: list[str] = []
    states: list[JobState] = []
    with clear_errors(), _cancelling(app, ids):
        lasting_backend(app)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
            given = parameters if seed is None else {**parameters, "seed": seed + number}
            ids.append(app.tasks["sdtpu.generate"].apply_async((prompt,), given, priority=priority).id)
        states = _wait(app, ids, quiet=as_json)
        saved = [_save(app, job_id, state, out) for job_id, state in zip(ids, states, strict=True)]
    if as_json:
        jobs = zip(ids, states, saved, strict=True)
        click.echo(json.dumps({"jobs": [_facts(job_id, state) | {"file": path} for job_id, state, path in jobs]}))
    else:
        _show(ids, states, saved)
    if any(path is None for path in saved):
        raise SystemExit(FAILED)


@click.command()
@app_option
@click.argument("job_id", metavar="ID")
@json_option
def status(app_path: str | None, job_id: str, as_json: bool) -> None:
    """Say how far a job is. Celery cannot tell a job that waits from one that never was: both are `queued`.

    Exit code 0: it has succeeded; 3: it has failed or was cancelled; 4: it has not ended.
    """
    with clear_errors():
        (state,) = _read_states(find_client_app(app_path), [job_id])
    if as_json:
        click.echo(json.dumps(_facts(job_id, state)))
    else:
        click.echo(_line(job_id, state))
    raise SystemExit(0 if state.status == "succeeded" else FAILED if state.has_ended else NOT_YET)


@click.command()
@app_option
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@json_option
def cancel(app_path: str | None, job_ids: tuple[str, ...], as_json: bool) -> None:
    """Take jobs out of the queue or off their slots. A job that has ended stays as it is."""
    app = find_client_app(app_path)
    with clear_errors():
        _cancel_all(app, job_ids)
        states = _read_states(app, job_ids)
    if as_json:
        facts = [_facts(job_id, state) for job_id, state in zip(job_ids, states, strict=True)]
        click.echo(json.dumps({"jobs": facts}))
        return
    for job_id, state in zip(job_ids, states, strict=True):
        click.echo(_line(job_id, state))


def _read_size(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise click.ClickException(f"--size must be WIDTHxHEIGHT in pixels, like 512x512, got {size!r}")
    return {"width": int(width), "height": int(height)}


@contextlib.contextmanager
def _cancelling(app: Celery, ids: Sequence[str]) -> Iterator[None]:
    """Cancel the jobs if the block does not end well."""
    from sdtpu_worker.errors import SdtpuError

    try:
        yield
    except KeyboardInterrupt:
        _cancel_all(app, ids)
        raise click.ClickException(f"stopped; {len(ids)} jobs were cancelled where they were not done") from None
    except BaseException:
        with contextlib.suppress(SdtpuError):
            _cancel_all(app, ids)
        raise


def _cancel_all(app: Celery, ids: Sequence[str]) -> None:
    """Cancel jobs.

    Raises:
        SdtpuError: the broker or the result backend cannot be reached, or used.
    """
    from sdtpu_worker.client.cancel import cancel_job
    from sdtpu_worker.client.stored_state import lasting_backend

    lasting_backend(app)
    for job_id in ids:
        with _reading_state(app, job_id):
            cancel_job(app, job_id)


def _read_states(app: Celery, ids: Sequence[str]) -> list[JobState]:
    """Return the states of jobs as they are now.

    Raises:
        SdtpuError: the result backend cannot be reached, or used.
    """
    from sdtpu_worker.client.stored_state import lasting_backend
    from sdtpu_worker.web.job_state import read_state_of

    backend, states = lasting_backend(app), []
    for job_id in ids:
        with _reading_state(app, job_id):
            states.append(read_state_of(backend, job_id))
    return states


@contextlib.contextmanager
def _reading_state(app: Celery, job_id: str) -> Iterator[None]:
    """Name the job and the result backend where that does not answer."""
    from sdtpu_worker.client.broker_errors import unavailable
    from sdtpu_worker.errors import SdtpuError

    try:
        yield
    except SdtpuError:
        raise
    except Exception as exc:  # each result backend has errors of its own
        raise unavailable(app, exc, at_backend=True, failed=f"the state of job {job_id} cannot be read") from exc


def _wait(app: Celery, ids: Sequence[str], quiet: bool) -> list[JobState]:
    """Wait until all jobs have ended, with a bar of their steps where somebody looks."""
    states = _read_states(app, ids)
    bar: Any = click.progressbar(
        length=100 * len(ids), label=f"{len(ids)} pictures", file=sys.stderr, hidden=quiet, show_eta=False,
        item_show_func=lambda _: _summary(states),
    )  # fmt: skip
    done = 0
    with bar:
        while not all(state.has_ended for state in states):
            time.sleep(_POLL_S)
            fresh = _read_states(app, ids)
            states = [old if old.has_ended else new for old, new in zip(states, fresh, strict=True)]
            percent = sum(100 if state.has_ended else (state.progress or {}).get("percent") or 0 for state in states)
            bar.update(max(0, percent - done), states)
            done = max(done, percent)
    return states


def _summary(states: Sequence[JobState]) -> str:
    counts = {name: sum(state.status == name for state in states) for name in ("queued", "running")}
    etas = [eta_s for state in states if (eta_s := (state.progress or {}).get("eta_s"))]
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{text}, {max(etas):.0f} s left" if etas else text


def _save(app: Celery, job_id: str, state: JobState, out: Path) -> str | None:
    """Write a job's picture; return the file, None where there is no picture."""
    from sdtpu_worker.images.decode import named_image
    from sdtpu_worker.images.names import stored_name
    from sdtpu_worker.images.store import read_image_bytes

    if state.result is None:
        return None
    _, image = named_image(state.result)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{stored_name(job_id)}.{_SUFFIXES[image.format]}"
    path.write_bytes(read_image_bytes(state.result, app))
    return str(path)


def _show(ids: Sequence[str], states: Sequence[JobState], saved: Sequence[str | None]) -> None:
    from sdtpu_worker.commands.terminal_picture import show_picture

    for job_id, state, path in zip(ids, states, saved, strict=True):
        if path is not None:
            show_picture(Path(path))
            assert state.result is not None
            click.echo(f"{path}  seed {state.result['seed']}")
        else:
            click.echo(_line(job_id, state), err=True)


def _facts(job_id: str, state: JobState) -> dict[str, Any]:
    error = asdict(state.error) if state.error else None
    return {"id": job_id, "status": state.status, "progress": state.progress, "result": state.result, "error": error}


def _line(job_id: str, state: JobState) -> str:
    progress: Mapping[str, Any] = state.progress or {}
    more = ""
    if progress.get("total"):
        more = f", step {progress['current']} of {progress['total']}"
        more += f", done in {progress['eta_s']:.1f} s" if progress.get("eta_s") is not None else ""
    if state.error is not None:
        more = f": {state.error.type}: {state.error.detail}"
    return f"{job_id}: {state.status}{more}"
