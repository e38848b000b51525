"""How the tests of this room start a worker."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from sdtpu_worker.testing.processes import running, wait_for_line, worker_command, worker_env
from tests.support.paths import XLA_CACHE


@contextlib.contextmanager
def start_worker(
    redis_url: str, folder: Path, *options: str, app: str = "sdtpu_worker.app", **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a worker until it consumes; yield the process and its log."""
    log = folder / "worker.log"
    settings = {"SDTPU_PLATFORM": "cpu", "SDTPU_COMPILE_CACHE": XLA_CACHE, **settings}
    command = worker_command(app, "-n", f"{uuid.uuid4().hex}@test", *options)
    with running(command, log, env=worker_env(redis_url, **settings), cwd=folder) as process:
        wait_for_line(process, log, "ready: ", 120)
        wait_for_line(process, log, " ready.", 30)
        yield process, log
