"""The Celery pool that holds the devices: a thread per job in flight, two batches of jobs."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.platforms import EX_FAILURE
from celery.signals import worker_shutting_down
from celery.worker import state

from sdtpu_worker.config import Config, read_config
from sdtpu_worker.errors import SdtpuError
from sdtpu_worker.images.store import make_image_store
from sdtpu_worker.worker import services as worker
from sdtpu_worker.worker.job import DeviceJob, answer_directly
from sdtpu_worker.worker.serving import Hooks, Serving, start_serving, stop_serving
from sdtpu_worker.worker.urgent import UrgentPrefetch

logger = logging.getLogger(__name__)

_HAND_OVER_SHARE, _HAND_OVER_S = 0.3, 2.0
"""How much of the grace period is kept for writing states to Redis: a share, and at most so many seconds."""
_STORE_S = 10.0
"""How long jobs that left the devices may take to encode, store and end."""
_GC_THRESHOLD = gc.get_threshold()


class DeviceApplyResult(ApplyResult):
    """What Celery holds of a job in the pool; the job keeps it alive, since Celery's reference is weak."""

    def __init__(self, future: Future[None], job: DeviceJob) -> None:
        super().__init__(future)
        self.job = job

    def terminate(self, signal: Any = None) -> None:
        """Take the job off its slot; the signal is ignored."""
        self.job.terminate()


class DevicePool(TaskPool):
    """Starts and warms the engine before the worker consumes; finishes or hands over its jobs when it stops.

    The number of threads is two batches (twice the slots), whatever `--concurrency` says, so that the next batch
    gathers and the last one is encoded and stored while the devices work; and a batch more for urgent jobs that are
    taken past that limit.
    """

    holds_devices = True
    """How `install` tells this pool, and pools made of it, from Celery's own without importing it."""
    make_policy: Callable[..., Any] | None = None
    """Makes another policy than `Aggregator`, of the engine and the configuration; for comparisons."""
    start_serving = staticmethod(start_serving)
    """Makes what serves, of the configuration; for tests with another engine."""
    serving: Serving | None = None
    urgent: UrgentPrefetch | None = None
    _drain_until: float | None = None
    _is_stopping = False

    def on_start(self) -> None:
        """Make the engine ready; a `ConfigurationError` ends the worker with one line and a failure code."""
        self._worker = worker.current()
        self._jobs: dict[int, DeviceJob] = {}  # by the native id of the thread that runs it
        self._results: dict[DeviceJob, DeviceApplyResult] = {}
        self._signals = 0
        try:
            self.config: Config = read_config(self.app.conf)
            store = make_image_store(self.app, self.config.image_store)
            hooks = Hooks(on_death=_stop_worker, make_policy=self.make_policy)
            if self._worker is not None:
                hooks = replace(hooks, on_start=self._worker.record_starts, give_up=self._worker.stopping.is_set)
            self.serving = self.start_serving(self.config, store, hooks)
            if self._worker is not None:
                loop = self.serving.loop
                self._worker.health.watch_device(lambda: loop.alive, lambda: loop.stalled_s)
                self._worker.start()
        except SdtpuError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc
        self.limit = self.serving.capacity
        self.executor = ThreadPoolExecutor(
            self.limit + self.serving.engine.num_slots,
            thread_name_prefix="sdtpu-job",
            initializer=self._worker.wait_for_results if self._worker is not None else None,
        )
        worker_shutting_down.connect(self._on_shutdown_signal)
        _keep_out_of_garbage_collection()

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
        deliveries = self._worker.deliveries if self._worker else None
        if deliveries is not None:
            deliveries.mark_running(request.message.delivery_tag)
            answer_directly(request)
        job = DeviceJob(
            request,
            soft_timeout or self.options.get("soft_timeout"),
            timeout or self.options.get("timeout"),
            timeout_callback,
            self.serving.loop.cancel,
            deliveries,
            self.config.max_deliveries,
        )
        future = self.executor.submit(self._run, job, target, args, kwargs, callback, accept_callback)
        self._results[job] = result = DeviceApplyResult(future, job)
        future.add_done_callback(lambda _: self._results.pop(job, None))
        return result

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Take the job that a thread runs off its slot: `revoke(terminate=True)`.

        Called before the job's new state is announced, so that the job stores none of its own afterwards.
        """
        if job := self._jobs.get(pid):
            job.terminate()

    def on_close(self) -> None:
        """The worker stops: jobs that can be done within the grace period are finished, the others are handed over."""
        if self.serving is not None and self._drain_until is None:
            self._drain(self.config.grace_s)

    def hand_over(self) -> None:
        """Hand every job over now; also from a signal handler."""
        if self.serving is not None:
            self._drain(0.0)

    def on_stop(self) -> None:
        """Wait for the jobs in flight, then stop the engine; again, from a signal handler, is a wish for haste."""
        if self._is_stopping:
            self.hand_over()
            return
        self._is_stopping = True
        if state.should_terminate:
            self.hand_over()
        self.on_close()
        late = self._wait_for_jobs()
        self.executor.shutdown(wait=not late, cancel_futures=True)
        worker_shutting_down.disconnect(self._on_shutdown_signal)
        stop_serving()
        gc.unfreeze()
        gc.set_threshold(*_GC_THRESHOLD)
        if self._worker is not None:
            self._worker.stop(is_stuck=late)

    def on_terminate(self) -> None:
        """A cold shutdown."""
        self.hand_over()
        self.on_stop()

    def _drain(self, grace_s: float) -> None:
        """Have no job on the devices after this time, less what writing their states takes."""
        assert self.serving is not None
        self._drain_until = time.monotonic() + grace_s
        if self._worker is not None:
            self._worker.health.drain()
        self.serving.loop.drain(grace_s - min(_HAND_OVER_SHARE * grace_s, _HAND_OVER_S))

    def _in_flight(self) -> list[Future[None]]:
        return [result.f for result in self._results.copy().values()]

    def _wait_for_jobs(self) -> bool:
        """Wait until every job has ended; return whether some do not."""
        started = time.monotonic()
        while futures := self._in_flight():
            if time.monotonic() >= (self._drain_until or started) + _STORE_S:  # a signal may have cut it short
                break
            wait(futures, 0.2)
        else:
            return False
        if self._worker is not None:
            self._worker.stopping.set()  # whoever waits for Redis gives up
        return bool(wait(self._in_flight(), _STORE_S).not_done)

    def _on_shutdown_signal(self, sig: str = "", how: str = "", **_: Any) -> None:
        """Count the signals: the second one means at once."""
        self._signals += 1
        if self._signals > 1:
            self.hand_over()

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
            """Let Celery store and acknowledge."""
            if self.urgent is not None:
                self.urgent.on_job_end()
            if callback is not None:
                callback(result)

        thread = threading.get_native_id()
        self._jobs[thread] = job
        try:
            with job.in_this_thread():
                apply_target(target, args, kwargs, end, accept_callback, pid=thread)
        except Exception:
            logger.exception("task %s could not be brought to an end", job.task_id)
        finally:
            self._jobs.pop(thread, None)
            job.let_go()

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
                "deliveries": self._worker.to_json() if self._worker else {},
            }
        return info


def _keep_out_of_garbage_collection() -> None:
    """Let the collector never look again at what start-up made: with JAX it would stop the world for 0.2 s each time.

    The second collection has it take note of how little is left. Looking at that is cheap, so it does so five times as
    often as Python would: the memory of a job that failed, with all of its traceback, is free soon.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
    young, middle, _ = _GC_THRESHOLD
    gc.set_threshold(young, middle, 2)


def _stop_worker() -> None:
    """End the worker with a code of its own, for its supervisor to start it anew on a healthy device."""
    state.should_stop = worker.EX_ENGINE_LOST
