"""`sdtpu demo`: sends prompts through a private Redis to a worker on simulated devices, and saves the pictures."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sdtpu_worker.demo import mix
from sdtpu_worker.testing.processes import (
    StartFailed,
    private_redis,
    running,
    wait_for_line,
    worker_command,
    worker_env,
)

PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a purple background",
    "a white heart on a red background",
    "a green triangle on a white background",
    "a blue square on a yellow background",
    "an orange ring on a black background",
    "a small white star on a blue background",
    "a large black heart on an orange background",
    "a purple circle on the left of a yellow background",
    "a red triangle on the right of a white background",
    "a yellow square at the top of a green background",
    "a white ring at the bottom of a purple background",
    "a large green circle on a black background",
    "a small red heart on a white background",
    "a blue star on an orange background",
    "a black square on a red background",
    "a large yellow triangle on a blue background",
    "a small orange square on a purple background",
    "a white circle on the right of a black background",
    "a purple heart at the top of a white background",
    "a green ring on a yellow background",
    "a blue triangle at the bottom of an orange background",
    "a large red star on a yellow background",
    "a black ring on the left of a green background",
)
EMBEDDED, EMBEDDED_STEPS = "embedded", 30
START_TIMEOUT_S = 300.0
"""Seconds for the worker to start and compile."""
JOB_TIMEOUT_S = 600.0
"""Seconds for all jobs together."""


class DemoFailed(Exception):
    """The demo could not finish; the text says why."""


@dataclass(frozen=True)
class DemoJob:
    """One job of the demo.

    Attributes:
        label: what the contact sheet says of it.
        parameters: without pictures.
        mixed: what else it is, with `--mix`.
    """

    label: str
    parameters: Mapping[str, Any]
    mixed: mix.MixedJob | None = None


def run_demo(
    out: Path,
    prompts: list[str],
    model: str,
    steps: int | None,
    seed: int,
    devices: int,
    slots_per_device: int | None,
    is_mix: bool = False,
) -> None:
    """Run the demo and print what it measured. Redis and the worker have stopped when it returns or raises.

    Args:
        out: the folder for the images and the worker's log; made if it does not exist.
        prompts: one for each job; none for the 24 prompts of the demo.
        model: the checkpoint that the worker serves.
        steps: denoising steps of each job; None for 30 with the shipped checkpoint, else the checkpoint's own.
        seed: the seed of the first job; each further job has the next number.
        devices: how many CPU devices the worker simulates.
        slots_per_device: jobs that one device denoises at the same time; None for 1, and for 3 with the mix.
        is_mix: run the jobs of `mix.JOBS`.

    Raises:
        DemoFailed: a parameter is not allowed, a process did not start, or a job failed.
    """
    started = time.monotonic()
    if is_mix:
        _check_mix(prompts, model, steps)
        jobs = [DemoJob(job.label, job.parameters(seed), job) for job in mix.JOBS]
    else:
        steps = EMBEDDED_STEPS if steps is None and model == EMBEDDED else steps
        more = {} if steps is None else {"num_inference_steps": steps}
        jobs = [
            DemoJob(prompt, {"prompt": prompt, "seed": seed + i, **more}) for i, prompt in enumerate(prompts or PROMPTS)
        ]
    _check_parameters(jobs)
    slots_per_device = slots_per_device or (mix.SLOTS_PER_DEVICE if is_mix else 1)
    out.mkdir(parents=True, exist_ok=True)
    log, trace = out / "worker.log", out / "timeline.json"
    log.unlink(missing_ok=True)
    settings = {**mix.SETTINGS, "SDTPU_TRACE": str(trace.resolve())} if is_mix else {}
    try:
        with contextlib.ExitStack() as stack:
            click.echo("starting a private Redis …")
            redis_url = stack.enter_context(private_redis())
            click.echo(f"starting a worker on {devices} simulated devices (log: {log}) …")
            process = stack.enter_context(demo_worker(redis_url, log, model, devices, slots_per_device, settings))
            click.echo(re.sub(r"^.*(?=ready:)", "", wait_for_line(process, log, "ready: ", START_TIMEOUT_S)))
            wait_for_line(process, log, " ready.", START_TIMEOUT_S)
            report, task_ids = _produce(redis_url, jobs, out)
    except StartFailed as exc:
        raise DemoFailed(str(exc)) from exc
    started_in = re.search(r"(?<=started in ).*", log.read_text(errors="replace"))
    if is_mix:
        _print_mix(mix.count_shared_ticks(trace, dict(zip(task_ids, mix.JOBS, strict=True))), report)
    _print_report(report, started_in.group() if started_in else "", time.monotonic() - started, out)


def _check_mix(prompts: Sequence[str], model: str, steps: int | None) -> None:
    """Make sure that nothing is asked for that the mix decides itself.

    Raises:
        DemoFailed: something is.
    """
    if model != EMBEDDED:
        raise DemoFailed(
            f"--model must be {EMBEDDED} with --mix, whose jobs use guidance and the LoRA that was trained for it, got"
            f" {model!r}; leave out one of the two"
        )
    if prompts or steps is not None:
        raise DemoFailed(
            f"{'--prompt' if prompts else '--steps'} must be left out with --mix, each of whose jobs has its own"
        )


def _check_parameters(jobs: Sequence[DemoJob]) -> None:
    """Check the parameters of every job.

    Raises:
        DemoFailed: one is not allowed; no process was started.
    """
    from sdtpu_worker import GenerationRequest, InvalidRequest

    try:
        for job in jobs:
            pictures = job.mixed.pictures(None) if job.mixed else {}
            GenerationRequest(**{**job.parameters, **dict.fromkeys(pictures, "redis:sdtpu:image:first")})
    except InvalidRequest as exc:
        raise DemoFailed(f"InvalidRequest: {exc}") from exc


@contextlib.contextmanager
def demo_worker(
    redis_url: str, log: Path, model: str, devices: int, slots_per_device: int, settings: Mapping[str, str]
) -> Iterator[Any]:
    """Run a worker on simulated devices, in a temporary folder, and end it with the block."""
    env = worker_env(
        redis_url,
        SDTPU_MODEL=str(Path(model).resolve()) if Path(model).exists() else model,
        SDTPU_PLATFORM="cpu",
        SDTPU_CPU_DEVICES=str(devices),
        SDTPU_SLOTS_PER_DEVICE=str(slots_per_device),
        **settings,
    )
    with tempfile.TemporaryDirectory(prefix="sdtpu-worker-") as folder:
        command = worker_command("sdtpu_worker.app")
        with running(command, log, env=env, cwd=Path(folder)) as process:
            yield process


def _produce(redis_url: str, asked: Sequence[DemoJob], out: Path) -> tuple[dict[str, Any], list[str]]:
    """Do what a web app does: enqueue every prompt as a task, wait for the results, save the pictures.

    Returns:
        What was measured, for the report; and the task ids.
    """
    from celery import Celery

    from sdtpu_worker import install, open_image

    app = install(Celery("demo-producer", broker=redis_url, backend=redis_url))
    app.set_current()
    app.set_default()
    before = _worker_stats(app)
    began = time.monotonic()
    prompts = [each.parameters["prompt"] for each in asked]
    jobs = _enqueue(asked)
    results: dict[int, dict[str, Any]] = {}
    with click.progressbar(length=len(jobs), label=f"{len(jobs)} tasks", show_pos=True) as bar:
        while len(results) < len(jobs):
            if time.monotonic() - began > JOB_TIMEOUT_S:
                raise DemoFailed(
                    f"{len(jobs) - len(results)} of {len(jobs)} tasks have not ended after {JOB_TIMEOUT_S:.0f} s"
                )
            for i, job in enumerate(jobs):
                if i not in results and job.ready():
                    if job.failed():
                        raise DemoFailed(f"task {job.id} ({prompts[i]!r}) failed: {job.result!r}")
                    results[i] = job.result
                    bar.update(1)
            time.sleep(0.05)
    wall_s = time.monotonic() - began
    ordered = [results[i] for i in range(len(jobs))]
    images = [open_image(result, app) for result in ordered]
    for old in out.glob("[0-9][0-9][0-9]-*.png"):
        old.unlink()
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
        image.save(out / f"{i:03d}-{slug}.png", pnginfo=_text_chunks(image))
    labelled_grid(images, [each.label for each in asked], lines=3 + any(each.mixed for each in asked)).save(
        out / "grid.png"
    )
    summary = _summarise(before, _worker_stats(app), wall_s, len(jobs))
    (out / "results.json").write_text(json.dumps({"summary": summary, "results": ordered}, indent=2) + "\n")
    app.close()
    return summary, [job.id for job in jobs]


def _enqueue(asked: Sequence[DemoJob]) -> list[Any]:
    """Enqueue every job, and return their results; one that starts from the first one's image waits for it."""
    from sdtpu_worker import generate

    jobs: list[Any] = []
    for each in asked:
        pictures = each.mixed.pictures(jobs[0].get(timeout=JOB_TIMEOUT_S)) if each.mixed and jobs else {}
        jobs.append(generate.delay(**each.parameters, **pictures))
    return jobs


def labelled_grid(
    images: Sequence[Any], labels: Sequence[str], columns: int = 6, side: int = 160, lines: int = 3
) -> Any:
    """Return a contact sheet: each image, enlarged to `side` pixels, with at most `lines` of its label below."""
    from PIL import Image, ImageDraw, ImageFont

    from sdtpu_worker.images.encode import image_grid

    cells, font = [], ImageFont.load_default(11)
    for image, label in zip(images, labels, strict=True):
        cell = Image.new("RGB", (side + 12, side + 12 + 12 * lines), "white")
        cell.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (6, 6))
        draw, written, line = ImageDraw.Draw(cell), [], ""
        for word in label.split():
            if line and draw.textlength(f"{line} {word}", font) > side:
                written.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        draw.multiline_text((8, side + 10), "\n".join([*written, line][:lines]), fill="black", font=font, spacing=1)
        cells.append(cell)
    columns = min(columns, len(cells))
    return image_grid(cells, -(-len(cells) // columns), columns)


def _text_chunks(image: Any) -> Any:
    """Return the text chunks of an opened PNG, to be saved with it again."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in image.text.items():
        info.add_itxt(name, str(value))
    return info


def _worker_stats(app: Any) -> dict[str, Any]:
    """Return what the worker counts of its devices, from `inspect stats`."""
    replies = app.control.inspect(timeout=5).stats() or {}
    for reply in replies.values():
        if "sdtpu" in reply.get("pool", {}):
            return {**reply["pool"]["sdtpu"], **reply["pool"]["sdtpu"]["loop"]}
    raise DemoFailed("the worker does not answer `inspect stats` within 5 s; see worker.log")


def _summarise(before: dict[str, Any], after: dict[str, Any], wall_s: float, jobs: int) -> dict[str, Any]:
    busy_s = sum(after["device_busy_s"]) - sum(before["device_busy_s"])
    active_s = after["active_s"] - before["active_s"]
    slot_s = after["occupied_slot_s"] - before["occupied_slot_s"]
    return {
        "jobs": jobs,
        "devices": after["devices"],
        "slots": after["slots"],
        "wall_s": round(wall_s, 3),
        "device_seconds_used": round(busy_s, 3),
        "device_seconds_idle": round(max(0.0, active_s * after["devices"] - busy_s), 3),
        "slot_occupancy": round(slot_s / max(active_s * after["slots"], 1e-9), 4),
        "seconds_per_image": round(wall_s / jobs, 4),
        "compile_s": after["compile_s"],
        "compile_cache": after["compile_cache"],
        "programs_compiled_meanwhile": after["traces_since_ready"] - before["traces_since_ready"],
    }


def _print_mix(shared: mix.SharedTicks, report: dict[str, Any]) -> None:
    compiled = report["programs_compiled_meanwhile"]
    click.echo(f"""
{mix.table(mix.JOBS)}

one device batch     {shared.jobs} jobs in one tick of {shared.ticks}, of {shared.kinds} kinds, with {shared.settings}\
 different settings of sampler, steps and guidance
compiled meanwhile   {compiled or "nothing"}""")


def _print_report(report: dict[str, Any], started_in: str, total_s: float, out: Path) -> None:
    click.echo(f"""
jobs                 {report["jobs"]}, each a task of its own, in {report["wall_s"]:.1f} s
device-seconds used  {report["device_seconds_used"]:.1f}
device-seconds idle  {report["device_seconds_idle"]:.1f}
slot occupancy       {100 * report["slot_occupancy"]:.0f} % of {report["slots"]} slots on {report["devices"]} devices
seconds per image    {report["seconds_per_image"]:.2f}
worker start-up      {started_in}
whole demo           {total_s:.0f} s

{out / "grid.png"} shows all pictures; {out / "results.json"} has every result.""")
