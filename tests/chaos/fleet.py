"""Real worker processes that a test starts, kills and asks; and a ledger of the jobs that it gave them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import redis

from sdtpu_worker import generate
from sdtpu_worker.images.store import read_image_bytes
from sdtpu_worker.testing.processes import running, wait_for_line, worker_command, worker_env
from tests.chaos.pictures import count_brought, expected_count, shown_count
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

FAKE_APP = "tests.chaos.fake_worker"


class WorkerProcess:
    """A worker: its process and its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait(60)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 60.0) -> int:
        """End it with SIGTERM; return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def text(self) -> str:
        """Return its log."""
        return self.log.read_text(errors="replace")

    def loop_stats(self) -> dict[str, Any]:
        """Return the counters that its device loop wrote to the log when it ended."""
        found = re.findall(r"the device loop is closed: (\{.*\})", self.text())
        return json.loads(found[-1]) if found else {}

    def memory_kib(self) -> int:
        """Return how much memory it has in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


class Fleet:
    """Workers of one queue; all are ended with the block.

    Args:
        redis_url: broker and result backend.
        folder: for the logs.
        app: whose worker; the fake one by default.
        settings: in upper case, for every worker.
    """

    def __init__(self, redis_url: str, folder: Path, app: str = FAKE_APP, **settings: str) -> None:
        self.redis_url, self.folder, self.app, self.settings = redis_url, folder, app, settings
        self.workers: list[WorkerProcess] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: Any) -> None:
        for worker in self.workers:
            if worker.is_running:
                worker.process.kill()
        self._stack.close()

    def launch(self, name: str, *options: str, **settings: str) -> WorkerProcess:
        """Start a worker and return at once."""
        log = self.folder / f"{len(self.workers)}-{name}.log"
        settings = {"SDTPU_PLATFORM": "cpu", "SDTPU_PROGRESS_S": "0", **self.settings, **settings}
        command = worker_command(self.app, "-n", f"{name}@chaos", *options)
        env = worker_env(self.redis_url, **settings)
        process = self._stack.enter_context(running(command, log, env=env, cwd=ROOT))
        self.workers.append(WorkerProcess(name, process, log))
        return self.workers[-1]

    def start(self, name: str, *options: str, **settings: str) -> WorkerProcess:
        """Start a worker and wait until it consumes."""
        worker = self.launch(name, *options, **settings)
        wait_for_line(worker.process, worker.log, " ready.", 120)
        return worker


@dataclass
class Ledger:
    """The jobs that were given to the workers, and what became of them.

    Attributes:
        mixed: returns by seed what a job brings besides, such as `mixed_parameters`; for `wrong_pictures` nothing else.
    """

    jobs: dict[str, tuple[Any, int, int]] = field(default_factory=dict)  # by id: result, seed, steps
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    mixed: Callable[[int], dict[str, Any]] = lambda _: {}

    def add(self, seed: int, steps: int, prompt: str = "x", **options: Any) -> str:
        """Enqueue a job; return its id."""
        kwargs = {"seed": seed, "num_inference_steps": steps, **self.mixed(seed)}
        job = generate.apply_async((prompt,), kwargs, **options)
        # without the AsyncResult: when it is collected, it talks to a Redis that is gone by then
        self.jobs[job.id] = SimpleNamespace(backend=job.backend), seed, steps
        return job.id

    def collect(self) -> int:
        """Take in what is done; return how many jobs are not."""
        for task_id, (job, _, _) in self.jobs.items():
            if task_id in self.results or task_id in self.errors:
                continue
            try:
                meta = job.backend.get_task_meta(task_id, cache=False)
            except redis.exceptions.ConnectionError:  # the test has cut it; a web server would be asked again
                break
            if meta["status"] == "SUCCESS":
                self.results[task_id] = meta["result"]
            elif meta["status"] in ("FAILURE", "REVOKED"):
                self.errors[task_id] = meta["result"]
        return len(self.jobs) - len(self.results) - len(self.errors)

    def wait(self, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until every job is done."""

        def are_done() -> bool:
            meanwhile()
            return not self.collect()

        wait_until(are_done, lambda: f"{self.collect()} of {len(self.jobs)} jobs", timeout_s)

    def wrong_pictures(self) -> list[str]:
        """Return the jobs whose picture does not show that each step was done once (of the fake engine)."""
        wrong = []
        for task_id, result in self.results.items():
            _, seed, steps = self.jobs[task_id]
            brings = self.mixed(seed)
            count = expected_count(seed, steps, count_brought(brings, brings.get("loras", ())))
            if shown_count(read_image_bytes(result)) != count:
                wrong.append(task_id)
        return wrong


def keys_left(client: Any) -> list[str]:
    """Return the keys that should not be there when every job is done: all but results, images and kombu's own."""
    passing = ("celery-task-meta-", "sdtpu:image:", "sdtpu:load:", "sdtpu:dead", "_kombu")
    keys = [raw.decode() for raw in client.scan_iter()]
    return sorted(
        key
        for key in keys
        if not key.startswith(passing)
        and not key.endswith(".reply.celery.pidbox")  # kombu's: a reply to mingle that came too late
        and not _says_that_a_chord_is_done(key)
    )


def wait_until_no_key_is_left(client: Any, timeout_s: float = 60) -> None:
    """Wait until no job has anything in Redis; say what it is that stays."""
    wait_until(lambda: not keys_left(client), lambda: f"no key of a job to be left: {keys_left(client)}", timeout_s)


def _says_that_a_chord_is_done(key: str) -> bool:
    return key.startswith("celery-taskset-meta-") and key.endswith(".c")
