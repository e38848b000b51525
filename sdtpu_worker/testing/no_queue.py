"""A stand-in for the whole queue in the tests of a web app: `generate.delay` is answered in the test's own process.

It needs no Redis, no worker and no JAX. Each job is an ordinary `AsyncResult`, whose state and result lie in memory.
The test decides what becomes of a job: by default it is done at once, with a small picture that is the same for the
same parameters.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.app import app_or_default
from celery.canvas import maybe_signature
from celery.exceptions import Ignore
from celery.utils import uuid

from sdtpu_worker.client.task import GenerateTask
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief
from sdtpu_worker.testing.memory_backend import MemoryBackend
from sdtpu_worker.testing.memory_redis import MemoryRedis
from sdtpu_worker.testing.no_devices import draw, stand_in
from sdtpu_worker.testing.stand_in_job import StandInJob

if TYPE_CHECKING:
    from celery import Celery, Task

_POSITIONAL = ("task_id", "producer", "link", "link_error", "shadow")
"""The arguments of `apply_async` after `args` and `kwargs`."""


class StandInWorker:
    """Takes every job of an app; a test tells it what becomes of them. Any thread may use it.

    Attributes:
        jobs: those that were enqueued, the oldest first.
        holds_jobs: whether jobs wait until the test ends them, by `finish`, `fail`, `expire` or `revoke`; set it.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.jobs: list[StandInJob] = []
        self.holds_jobs = False
        self.backend = MemoryBackend(app, self._look_at, MemoryRedis)
        self._lock = threading.RLock()
        self._by_key: dict[bytes, StandInJob] = {}
        self._refusals: list[Exception] = []
        self._plans: list[Callable[[StandInJob], None]] = []
        self._first_jobs: dict[tuple[str, str], tuple[str, str]] = {}

    def refuse_next(self, error: Exception) -> None:
        """Have the next `delay()` raise an error, such as `QueueFull("…", 12.0)`; nothing is enqueued then.

        Several calls refuse several jobs, in turn.
        """
        self._refusals.append(error)

    def fail_next(self, error: Exception) -> None:
        """Have the next job fail, as with `GenerationFailed("…")`, or with an `InvalidRequest` of the worker's."""
        self._plans.append(lambda job: job.fail(error))

    def expire_next(self) -> None:
        """Have the next job expire before it has a slot."""
        self._plans.append(StandInJob.expire)

    def slow_next(self, seconds: float) -> None:
        """Have the next job take a while: it shows its progress meanwhile, and ends when somebody looks at it then."""
        self._plans.append(lambda job: job.take(seconds))

    # What the task calls

    def send(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
        """Take a job, as `Task.apply_async` does; return its `AsyncResult`."""
        with self._lock:
            if self._refusals:
                raise self._refusals.pop(0)
            options |= dict(zip(_POSITIONAL, rest, strict=False))
            if options.get("chord") is not None:
                raise NotImplementedError(
                    "the stand-in runs a chord only with task_always_eager: set it in the settings of the tests"
                )
            task_id = options.pop("task_id", None) or uuid()
            options["link"] = _with_chain(options.pop("link", None), options.pop("chain", None), self.app)
            job = self._add(StandInJob(self._run, task, task_id, args, kwargs, options))
            if self._plans:
                self._plans.pop(0)(job)
            elif not self.holds_jobs:
                job.finish()
            return job.result

    def send_once(
        self, app: Celery, key: str, args: Sequence[Any], kwargs: Mapping[str, Any], send: Callable[[str], Any]
    ) -> Any:
        """Return what `send` returns, or for a repeated `idempotency_key` the first one's job."""
        with self._lock:
            whose, content = (str(kwargs.get("tenant") or ""), key), repr((tuple(args), sorted(kwargs.items())))
            if (first := self._first_jobs.get(whose)) is None:
                result = send(uuid())
                self._first_jobs[whose] = result.id, content
                return result
            if first[1] != content:
                raise InvalidRequest(
                    f"idempotency_key must be a new one for other parameters, got {brief(key)}, which was used before"
                )
            return app.AsyncResult(first[0])

    def draw(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Do a device worker's part of a job: draw, or raise what the test wants."""
        with self._lock:
            key = self.backend.get_key_for_task(task.request.id)
            job = self._by_key.get(key)
            if job is None:  # Celery's eager chains, groups and chords run their tasks without sending them
                job = self._add(StandInJob(self._run, task, task.request.id, args, kwargs, {}))
                if self._plans:
                    self._plans.pop(0)(job)
                    job.due_at = None  # whatever follows in the chain waits for it: it cannot be slow
                if job.has_ended:
                    raise Ignore
            if job.error is not None:
                raise job.error
            return draw(task, args, kwargs)

    def revoke(self, task_id: Any, *_: Any, **__: Any) -> None:
        """Take jobs off, as `app.control.revoke` does; jobs that have ended stay as they are."""
        for each in [task_id] if isinstance(task_id, str) else list(task_id):
            job = self._by_key.get(self.backend.get_key_for_task(each))
            if job is not None and not job.has_ended:
                job.revoke()

    def _run(self, job: StandInJob) -> None:
        """Run a job's code as Celery's eager mode does, store its end, and run what follows it."""
        conf = self.app.conf
        was_eager = conf.task_always_eager
        conf.task_always_eager = True
        try:
            job.task.apply(
                job.args, job.kwargs, task_id=job.id, throw=bool(was_eager and conf.task_eager_propagates),
                **job.options,
            )  # fmt: skip
        finally:
            conf.task_always_eager = was_eager

    def _add(self, job: StandInJob) -> StandInJob:
        self.jobs.append(job)
        self._by_key[self.backend.get_key_for_task(job.id)] = job
        return job

    def _look_at(self, key: bytes) -> None:
        """Move a slow job on, as somebody is about to read its state."""
        if (job := self._by_key.get(key)) is not None and job.due_at is not None:
            with self._lock:
                job.catch_up(time.monotonic())


@contextlib.contextmanager
def stand_in_worker(app: Celery | None = None) -> Iterator[StandInWorker]:
    """Have a stand-in take every job of an app for the block; see `StandInWorker`.

    Pictures lie in memory too. What follows a job in a chain, or is linked to it, runs when the job ends, in this
    process. Other tasks of the app run as its settings say.

    Args:
        app: the Celery app; None for the current one.
    """
    app = app_or_default(app)
    worker, folder = StandInWorker(app), f"sdtpu-stand-in-{uuid()}"
    before = app._backend_cache, GenerateTask.stand_in_worker
    app._backend_cache, GenerateTask.stand_in_worker = worker.backend, worker
    app.control.revoke = worker.revoke
    try:
        with _results_stored(app), stand_in(f"memory://{folder}", worker.draw):
            yield worker
    finally:
        del app.control.revoke
        app._backend_cache, GenerateTask.stand_in_worker = before
        _remove_pictures(folder)


@contextlib.contextmanager
def _results_stored(app: Celery) -> Iterator[None]:
    """Have the results of tasks stored that run in this process."""
    before = app.conf.task_store_eager_result
    tasks = {task: task.store_eager_result for task in app.tasks.values()}
    app.conf.task_store_eager_result = True  # for tasks that are made later; they read it once
    for task in tasks:
        task.store_eager_result = True
    try:
        yield
    finally:
        app.conf.task_store_eager_result = before
        for task, was_stored in tasks.items():
            task.store_eager_result = was_stored


def _with_chain(link: Any, chain: Any, app: Celery) -> list[Any]:
    """Return the callbacks of a job, with the next task of its chain as one of them: eager mode knows no chain."""
    links = list(link) if isinstance(link, list | tuple) else [link] if link else []
    following = None
    for each in chain or ():  # the last is the next
        before, following = following, maybe_signature(each, app=app).clone()
        if before is not None:
            following.link(before)
    return links if following is None else [*links, following]


def _remove_pictures(folder: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{folder}"):
        memory.rm(f"/{folder}", recursive=True)
