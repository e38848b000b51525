"""A job of the stand-in: what was asked for, and how a test moves it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.exceptions import TaskRevokedError

from sdtpu_worker.contract.request import GenerationRequest

if TYPE_CHECKING:
    from celery import Task
    from celery.result import AsyncResult


class StandInJob:
    """A job that was enqueued.

    Args:
        run: runs the job's code, and stores its end.
        task: `sdtpu.generate`.
        task_id, args, kwargs, options: of `apply_async`.

    Attributes:
        id: of the task.
        parameters: of `generate`, with the prompt and the seed.
        options: of `apply_async`, such as `priority`, `queue` and `expires`.
        error: with which it fails; None if it does not.
        due_at: the time of `time.monotonic` at which a slow job is done; None for another one.
    """

    def __init__(
        self,
        run: Callable[[StandInJob], None],
        task: Task,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._run, self.task = run, task
        self.id, self.args, self.kwargs, self.options = task_id, tuple(args), dict(kwargs), dict(options)
        self.parameters = {**({"prompt": args[0]} if args else {}), **kwargs}
        self.error: Exception | None = None
        self.due_at: float | None = None
        self._began_at, self._is_at_work, self._percent = 0.0, False, -1

    @property
    def result(self) -> AsyncResult:
        """What `generate.delay` has returned."""
        return self.task.AsyncResult(self.id)

    @property
    def has_ended(self) -> bool:
        """Whether it has succeeded or failed, or was revoked."""
        return self.result.state in self.task.backend.READY_STATES

    def progress(self, percent: int, preview: bytes | None = None) -> None:
        """Show progress, as the state `PROGRESS`.

        Args:
            percent: from 0 to 100, of its steps.
            preview: a PNG of a picture that is being made; None for none.

        Raises:
            RuntimeError: the job has ended.
        """
        import base64

        self._check_is_open()
        request = GenerationRequest.parse(self.args, self.kwargs).with_defaults("pndm")
        total = request.num_inference_steps or 1
        info: dict[str, Any] = {
            "current": total * percent // 100,
            "total": total,
            "percent": percent,
            "pending": False,
            "description": "denoising",
            "eta_s": None,
        }
        if preview is not None:
            info["preview"] = f"data:image/png;base64,{base64.b64encode(preview).decode()}"
        self.task.backend.store_result(self.id, info, "PROGRESS")

    def finish(self) -> None:
        """End it with its picture; what is linked to it follows.

        Raises:
            RuntimeError: the job has ended.
        """
        self._check_is_open()
        self.due_at = None
        self._run(self)

    def fail(self, error: Exception) -> None:
        """End it with an error.

        Raises:
            RuntimeError: the job has ended.
        """
        self.error = error
        if self.task.request.id != self.id:  # else it runs already, in an eager chain, group or chord
            self.finish()

    def expire(self) -> None:
        """End it as one that had no slot in time.

        Raises:
            RuntimeError: the job has ended.
        """
        self._end("expired")

    def revoke(self) -> None:
        """End it as one that was taken off.

        Raises:
            RuntimeError: the job has ended.
        """
        self._end("revoked")

    def take(self, seconds: float) -> None:
        """Let it be done when somebody looks at it, but not before this many seconds have passed."""
        self._began_at = time.monotonic()
        self.due_at = self._began_at + seconds

    def catch_up(self, now: float) -> None:
        """Store what a slow job would have got to by now.

        Args:
            now: of `time.monotonic`.
        """
        if self.due_at is None or self._is_at_work:
            return
        self._is_at_work = True
        try:
            if now >= self.due_at:
                self.finish()
                return
            percent = int(100 * (now - self._began_at) / (self.due_at - self._began_at))
            if percent > self._percent:
                self._percent = percent
                self.progress(percent)
        finally:
            self._is_at_work = False

    def _end(self, reason: str) -> None:
        self._check_is_open()
        self.due_at = None
        self.task.backend.store_result(self.id, TaskRevokedError(reason), "REVOKED")

    def _check_is_open(self) -> None:
        if self.has_ended:
            raise RuntimeError(f"the job {self.id} has ended already: it is {self.result.state}")
