"""The Celery pool that holds the devices: a thread per job in flight, two batches of jobs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.platforms import EX_FAILURE
from celery.worker import state

from sdtpu_worker.config import read_config
from sdtpu_worker.errors import SdtpuError
from sdtpu_worker.job import DeviceJob
from sdtpu_worker.prefetch import UrgentPrefetch
from sdtpu_worker.serving import Serving, start_serving, stop_serving
from sdtpu_worker.storage import make_image_store

logger = logging.getLogger(__name__)


class DeviceApplyResult(ApplyResult):
    """What Celery holds of a job in the pool; the job keeps it alive, since Celery's reference is weak."""

    def __init__(self, future: Future[None], job: DeviceJob) -> None:
        super().__init__(future)
        self.job = job

    def terminate(self, signal: Any = None) -> None:
        """Take the job off its slot; the signal is ignored."""
        self.job.terminate()


class DevicePool(TaskPool):
    """Starts and warms the engine before the worker consumes; drains its jobs when the worker stops.

    The number of threads is two batches (twice the slots), whatever `--concurrency` says, so that the next batch
    gathers and the last one is encoded and stored while the devices work; and a batch more for urgent jobs that are
    taken past that limit.
    """

    make_policy: Callable[..., Any] | None = None
    """Makes another policy than `Aggregator`, of the engine and the configuration; for comparisons."""
    serving: Serving | None = None
    urgent: UrgentPrefetch | None = None

    def on_start(self) -> None:
        """Make the engine ready; a `ConfigurationError` ends the worker with one line and a failure code."""
        try:
            config = read_config(self.app.conf)
            store = make_image_store(self.app, config.image_store)
            self.serving = start_serving(config, store, _stop_worker, self.make_policy)
        except SdtpuError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc
        self.limit = self.serving.capacity
        self.executor = ThreadPoolExecutor(self.limit + self.serving.engine.num_slots, thread_name_prefix="sdtpu-job")
        self._jobs: dict[int, DeviceJob] = {}  # by the native id of the thread that runs it
        self._results: dict[DeviceJob, DeviceApplyResult] = {}

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        callback: Callable[[Any], None] | None = None,
        accept_callback: Callable[[int, float], None] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        timeout_callback: Callable[[bool, float], None] | None = None,
        **_: Any,
    ) -> ApplyResult:
        """Run a task in a thread; its time limits count from the time when it has a slot."""
        request = getattr(accept_callback, "__self__", None)
        if request is None or self.serving is None:
            return super().on_apply(target, args, kwargs, callback, accept_callback)
        job = DeviceJob(
            request,
            soft_timeout or self.options.get("soft_timeout"),
            timeout or self.options.get("timeout"),
            timeout_callback,
            self.serving.loop.cancel,
        )
        future = self.executor.submit(self._run, job, target, args, kwargs, callback, accept_callback)
        self._results[job] = result = DeviceApplyResult(future, job)
        future.add_done_callback(lambda _: self._results.pop(job, None))
        return result

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Take the job that a thread runs off its slot: `revoke(terminate=True)`, and a cold shutdown.

        Called before the job's new state is announced, so that the job stores none of its own afterwards.
        """
        if job := self._jobs.get(pid):
            job.terminate()

    def on_stop(self) -> None:
        """Finish the jobs in flight, then stop the engine."""
        super().on_stop()
        stop_serving()

    def _run(
        self,
        job: DeviceJob,
        target: Callable[..., Any],
        args: Any,
        kwargs: Any,
        callback: Callable[[Any], None] | None,
        accept_callback: Any,
    ) -> None:
        def end(result: Any) -> None:
            """Let Celery store and acknowledge, unless the job goes back to the queue."""
            if self.urgent is not None:
                self.urgent.on_job_end()
            if callback is not None and not job.was_cancelled():
                callback(result)

        thread = threading.get_native_id()
        self._jobs[thread] = job
        try:
            with job.in_this_thread():
                apply_target(target, args, kwargs, end, accept_callback, pid=thread)
        finally:
            self._jobs.pop(thread, None)

    def _get_info(self) -> dict[str, Any]:
        info = dict(super()._get_info())
        if self.serving is not None:
            engine = self.serving.engine
            info["sdtpu"] = {
                "devices": engine.num_devices,
                "device_kind": engine.device_kind,
                "slots": engine.num_slots,
                "model": engine.checkpoint.name,
                "trace_s": round(engine.trace_s, 3),
                "compile_s": round(engine.compile_s, 3),
                "compile_cache": {"hits": engine.cache_hits, "misses": engine.cache_misses},
                "traces_since_ready": engine.traces_since_ready,
                "costs": {f"{h}x{w}": costs.to_json() for (h, w), costs in engine.costs.items()},
                "loop": self.serving.loop.stats.to_json(),
            }
        return info


def _stop_worker() -> None:
    """End the worker with a failure code, for its supervisor to start it anew on a healthy device."""
    state.should_stop = EX_FAILURE
