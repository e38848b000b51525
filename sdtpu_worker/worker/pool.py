"""The Celery pool that holds the devices: a thread for each job in flight, two batches of jobs."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.signals import worker_shutting_down
from celery.worker import state

from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.config import Config
from sdtpu_worker.device_loop.protocols import Policy, ServingEngine
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.images.store import make_image_store
from sdtpu_worker.operations.log_format import task_on_lines
from sdtpu_worker.worker.celery_request import DeviceRequest, answer_directly, current_job
from sdtpu_worker.worker.job import DeviceJob
from sdtpu_worker.worker.job_ends import JobLeft, end_of
from sdtpu_worker.worker.job_record import count_end, log_end, record_of
from sdtpu_worker.worker.process_changes import pause_collection
from sdtpu_worker.worker.urgent import UrgentPrefetch

if TYPE_CHECKING:
    from sdtpu_worker.worker.services import DeviceServices

logger = logging.getLogger(__name__)

_HAND_OVER_SHARE, _HAND_OVER_S = 0.3, 2.0
"""How much of the grace period is kept for writing snapshots to Redis: a share, and at most so many seconds."""
_STORE_S = 10.0
"""How long jobs that left the devices may take to encode, store and end."""


def make_engine(config: Config, on_phase: Callable[[str], None]) -> ServingEngine:
    """Return a warm engine on this host's devices; imports JAX, and tells what it is at."""
    on_phase("importing JAX")
    with pause_collection():
        from sdtpu_worker.diffusion.start import start_engine

    return start_engine(config, on_phase)


def make_aggregator(engine: ServingEngine, config: Config) -> Policy:
    """Return the policy for an engine."""
    return Aggregator(
        engine.costs,
        engine.info.slots_per_device,
        engine.info.phases_per_tick,
        config.tick_s,
        config.preemption,
        config.preview_every,
    )


class PoolStage(Enum):
    """Where a pool is in its life; it only goes forward, and may leave stages out."""

    WITHOUT_DEVICES = "no services: tasks run in threads as in Celery's own thread pool"
    SERVING = "takes jobs"
    DRAINING = "jobs that fit into the grace period are finished, the others handed over"
    STOPPING = "waits until the last job has ended"
    STOPPED = "no job and no thread is left, or those that are do not end"


class DevicePool(TaskPool):
    """Runs jobs on the devices; finishes or hands over its jobs when it stops.

    The number of threads is two batches (twice the slots), whatever `--concurrency` says, so that the next batch
    gathers and the last one is encoded and stored while the devices work; and a batch more for urgent jobs that are
    taken past that limit. With `sdtpu_reuse` there are some more, for jobs that wait for equal ones.

    A subclass may serve with other parts: `make_engine` of the configuration and of what is told how far it is,
    `make_store` of the app and the URL of its images, `make_policy` of the engine and the configuration.

    Attributes:
        services: what the worker's process has; None until the worker has started it.
        urgent: lends credits to urgent jobs, while the worker consumes from Redis.
        is_stuck: whether some jobs' threads did not end when the pool stopped.
    """

    holds_devices = True
    """How `install` tells this pool, and pools made of it, from Celery's own without importing it."""
    make_engine = staticmethod(make_engine)
    make_store = staticmethod(make_image_store)
    make_policy = staticmethod(make_aggregator)

    services: DeviceServices | None = None
    urgent: UrgentPrefetch | None = None
    is_stuck = False
    _stage = PoolStage.WITHOUT_DEVICES
    _drain_until: float | None = None

    def serve(self, services: DeviceServices) -> None:
        """Take jobs from now on."""
        assert services.serving is not None
        self.services, self._stage = services, PoolStage.SERVING
        self._results: dict[DeviceJob, ApplyResult] = {}  # also keeps them alive: Celery's reference is weak
        self._signals = 0
        self.limit = services.serving.capacity
        self.executor = ThreadPoolExecutor(
            self.limit + services.serving.engine.info.num_slots + services.serving.most_followers,
            thread_name_prefix="sdtpu-job",
            initializer=services.wait_for_results,
        )
        worker_shutting_down.connect(self._on_shutdown_signal)

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
        request, services = getattr(accept_callback, "__self__", None), self.services
        if request is None or services is None or services.serving is None or not args:
            return super().on_apply(target, args, kwargs, callback, accept_callback)
        deliveries = services.deliveries
        if deliveries is not None:
            deliveries.mark_running(request.message.delivery_tag)
            answer_directly(request)
        if not isinstance(request, DeviceRequest):  # another task of the app that was sent to a queue of this worker
            other = super().on_apply(target, args, kwargs, callback, accept_callback)
            if deliveries is not None:
                other.f.add_done_callback(lambda _: deliveries.release(request.message.delivery_tag))
            return other
        job = DeviceJob(
            request,
            services.serving,
            soft_timeout or self.options.get("soft_timeout"),
            timeout or self.options.get("timeout"),
            timeout_callback,
            deliveries,
            services.config.max_deliveries,
            lambda: self._stage is not PoolStage.SERVING,
            record_of(request),
        )
        future = self.executor.submit(self._run, job, target, args, kwargs, callback, accept_callback)
        self._results[job] = result = ApplyResult(future)
        future.add_done_callback(lambda _: self._results.pop(job, None))
        return result

    def terminate_job_of(self, request: DeviceRequest, signum: int) -> None:
        """Take the job of a request off its slot: `revoke(terminate=True)`. It returns at once.

        Args:
            request: Celery's request.
            signum: the signal that the client named.
        """
        for job in self._results.copy():
            if job.request is request:
                job.terminate(signum)

    def grow(self, n: int = 1) -> NoReturn:
        """Refuse `control pool_grow`, and the button in Flower.

        Raises:
            ConfigurationError: always, with the remedy.
        """
        raise ConfigurationError(
            "a device worker cannot grow or shrink: it holds as many jobs as its devices have slots, which are fixed"
            " when its programs are compiled; set sdtpu_slots_per_device and restart it, or start more workers"
        )

    def shrink(self, n: int = 1) -> NoReturn:
        """Refuse `control pool_shrink`, as `grow` does."""
        self.grow(n)

    def on_close(self) -> None:
        """The worker stops: jobs that can be done within the grace period are finished, the others are handed over."""
        if self.services is not None and self._stage is PoolStage.SERVING:
            self._drain(self.services.config.grace_s)

    def hand_over(self) -> None:
        """Hand every job over now; also from a signal handler."""
        if self._stage is not PoolStage.STOPPED:
            self._drain(0.0)

    def on_stop(self) -> None:
        """Wait for the jobs in flight and end their threads.

        Celery may call this again: from a signal handler while the first call waits, which then hands over at once;
        and after the pool has stopped, which does nothing.
        """
        if self.services is None:
            super().on_stop()
            return
        if self._stage in (PoolStage.STOPPING, PoolStage.STOPPED):
            self.hand_over()
            return
        if state.should_terminate:
            self.hand_over()
        self.on_close()
        self._stage = PoolStage.STOPPING
        self.is_stuck = not self._wait_for_jobs()
        self._stage = PoolStage.STOPPED
        self.executor.shutdown(wait=not self.is_stuck, cancel_futures=True)
        worker_shutting_down.disconnect(self._on_shutdown_signal)

    def on_terminate(self) -> None:
        """Hand everything over and stop: a cold shutdown."""
        self.hand_over()
        self.on_stop()

    def _drain(self, grace_s: float) -> None:
        """Have no job on the devices after the grace period, less what writing the snapshots takes."""
        if self.services is None or self.services.serving is None:
            return
        if self._stage is PoolStage.SERVING:
            self._stage = PoolStage.DRAINING
        self._drain_until = time.monotonic() + grace_s
        self.services.health.drain()
        self.services.serving.loop.drain(grace_s - min(_HAND_OVER_SHARE * grace_s, _HAND_OVER_S))

    def _in_flight(self) -> list[Future[None]]:
        return [result.f for result in self._results.copy().values()]

    def _wait_for_jobs(self) -> bool:
        """Wait until every job has ended; return whether that is so."""
        assert self.services is not None
        started = time.monotonic()
        while futures := self._in_flight():
            if time.monotonic() >= (self._drain_until or started) + _STORE_S:  # a signal may have cut it short
                break
            wait(futures, 0.2)
        else:
            return True
        self.services.stopping.set()  # jobs that wait for Redis give up
        return not wait(self._in_flight(), _STORE_S).not_done

    def _on_shutdown_signal(self, sig: str = "", how: str = "", **_: Any) -> None:
        """Count the signals that stop the worker: the second one hands over at once."""
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
        def trace(*args: Any, **kwargs: Any) -> Any:
            """Run the task as Celery does; return how its job ends where that is not for Celery's tracer to say."""
            try:
                return target(*args, **kwargs)
            except JobLeft as left:
                return left.with_traceback(None)

        def end(result: Any) -> None:
            """Let Celery store the result and acknowledge the message."""
            if self.urgent is not None:
                self.urgent.on_job_end()
            record.outcome, record.reason = end_of(result)
            if record.reused and record.outcome == "succeeded":
                record.reason = "reused"
            if isinstance(result, JobLeft):
                job.leave(result)
            elif callback is not None:
                callback(result)
            if job.request.is_requeued and record.outcome != "handed_over":  # its end could not be stored
                record.outcome, record.reason = "handed_over", "storage"

        record = job.record
        with self._measured(job):
            try:
                if left := job.find_early_end():
                    end(left)
                else:
                    apply_target(trace, args, kwargs, end, accept_callback, pid=threading.get_native_id())
            except Exception:
                logger.exception("task %s could not be brought to an end", job.task_id)
                record.outcome, record.reason = "lost_hold", ""
            finally:
                job.release()

    @contextlib.contextmanager
    def _measured(self, job: DeviceJob) -> Iterator[None]:
        """Let the calling thread's code know its job; log and count how that ended after the block."""
        token = current_job.set(job)
        with task_on_lines(job.task_id, job.request.name):
            try:
                yield
            finally:
                current_job.reset(token)
                log_end(job.record)
                if self.services is not None:
                    count_end(job.record, self.services.observation.figures)

    def _get_info(self) -> dict[str, Any]:
        info = dict(super()._get_info())
        if self.services is not None and self.services.serving is not None:
            engine, facts = self.services.serving.engine, self.services.serving.engine.info
            info["sdtpu"] = {
                "devices": facts.num_devices,
                "device_kind": facts.device_kind,
                "slots": self.services.serving.num_slots,
                "model": facts.model,
                "load_s": round(facts.load_s, 3),
                "trace_s": round(facts.trace_s, 3),
                "compile_s": round(facts.compile_s, 3),
                "kept_programs": facts.kept_programs,
                "compile_cache": {"hits": facts.cache_hits, "misses": facts.cache_misses},
                "traces_since_ready": engine.traces_since_ready,
                "costs": {f"{h}x{w}": costs.to_json() for (h, w), costs in engine.costs.items()},
                "loop": self.services.serving.loop.stats.to_json(),
                "deliveries": self.services.to_json(),
            }
        return info
