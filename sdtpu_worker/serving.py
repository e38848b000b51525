"""One host's engine, device loop and image store: runs a request from its parameters to a stored image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdtpu_worker.aggregator.loop import DeviceLoop
from sdtpu_worker.aggregator.plan import Aggregator
from sdtpu_worker.config import Config
from sdtpu_worker.errors import EngineUnavailable
from sdtpu_worker.images import encode_image
from sdtpu_worker.request import GenerationRequest
from sdtpu_worker.result import BatchPlace, GenerationResult, StoredImage, Timings
from sdtpu_worker.storage import ImageStore

if TYPE_CHECKING:
    from sdtpu_worker.diffusion.engine import Engine

logger = logging.getLogger(__name__)


class Serving:
    """A warm engine with its loop and store; `run` may be called from many threads at a time."""

    def __init__(
        self, engine: Engine, store: ImageStore, tick_s: float, on_death: Callable[[], None] = lambda: None
    ) -> None:
        self.engine, self.store = engine, store
        aggregator = Aggregator(engine.resolutions, engine.num_devices, engine.slots_per_device, tick_s)
        for lane, step_s in engine.step_s.items():
            aggregator.observe_step(lane, step_s)
        self.loop = DeviceLoop(engine, aggregator, on_death)
        self.loop.start()

    @property
    def capacity(self) -> int:
        """Jobs to hold at a time: two batches, so that one gathers and is encoded while the other is denoised."""
        return 2 * self.engine.num_slots

    def run(self, task_id: str, request: GenerationRequest, sent_at: float | None = None) -> GenerationResult:
        """Generate and store one image; blocks until it is stored.

        Args:
            task_id: names the job and its image.
            request: with a seed.
            sent_at: `time.time()` when the client sent it, if known; timings count from there.

        Raises:
            InvalidRequest: this worker cannot serve these parameters.
            GenerationFailed: the device failed on it.
            StorageError: the image could not be stored.
        """
        received = time.monotonic()
        waited_s = max(0.0, time.time() - sent_at) if sent_at is not None else 0.0
        job = self.engine.prepare(task_id, request)
        finished = self.loop.submit(job).result()
        pixels = finished.pixels
        unsafe = self.engine.check_safety(pixels)
        if unsafe:
            pixels = pixels * 0
        height, width = job.lane
        report: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "sampler": job.sampler,
            "model": self.engine.checkpoint.name,
        }
        data = encode_image(pixels, request.image_format, report)
        uri = self.store.put(task_id, request.image_format, data)
        total_s = waited_s + time.monotonic() - received
        logger.info(
            "task %s: %d steps in %.2f s on device %d slot %d, %d of %d slots in use",
            task_id, request.num_inference_steps, finished.finished_at - finished.started_at, finished.device,
            finished.slot, finished.occupied, self.engine.num_slots,
        )  # fmt: skip
        return GenerationResult(
            task_id=task_id,
            image=StoredImage(uri, request.image_format, width, height, len(data)),
            **report,
            prompt_truncated=job.truncated,
            nsfw_content_detected=unsafe,
            timings=Timings(
                queued_s=round(waited_s + finished.started_at - received, 4),
                device_s=round(finished.finished_at - finished.started_at, 4),
                total_s=round(total_s, 4),
            ),
            batch=BatchPlace(finished.device, finished.slot, finished.occupied, self.engine.num_slots),
        )

    def close(self) -> None:
        """Stop the device loop."""
        self.loop.close()


_current: Serving | None = None


def start_serving(config: Config, store: ImageStore, on_death: Callable[[], None] = lambda: None) -> Serving:
    """Find the devices, load the checkpoint, compile and really run every program; make the result `current()`.

    Args:
        config: the settings.
        store: where images go.
        on_death: called when the device loop cannot go on.

    Raises:
        ConfigurationError: a device, a checkpoint or a size that is configured is not there.
    """
    global _current
    started = time.monotonic()
    from sdtpu_worker.diffusion.cache import CompileCache
    from sdtpu_worker.diffusion.sharding import find_devices

    devices = find_devices(config.platform, config.cpu_devices)
    logger.info(
        "found %d devices of kind %s (platform %s, sdtpu_platform = %s)",
        len(devices), devices[0].device_kind, devices[0].platform, config.platform,
    )  # fmt: skip
    cache = CompileCache(config.compile_cache)
    from sdtpu_worker.diffusion.checkpoint import load_checkpoint
    from sdtpu_worker.diffusion.engine import Engine, choose_dtype

    dtype: Any = choose_dtype(config.dtype, devices[0].platform)
    checkpoint = load_checkpoint(config.model, dtype, config.revision)
    logger.info("loaded checkpoint %s in %s after %.1f s", config.model, dtype.__name__, time.monotonic() - started)
    engine = Engine(checkpoint, devices, config.slots_per_device, config.resolutions, cache)
    logger.info(
        "traced %d programs in %.2f s, compiled in %.2f s (compile cache: %d hits, %d misses)",
        len(engine.resolutions), engine.trace_s, engine.compile_s, engine.cache_hits, engine.cache_misses,
    )  # fmt: skip
    _current = Serving(engine, store, config.tick_s, on_death)
    sizes = ", ".join(f"{height}x{width} ({1000 * s:.1f} ms a step)" for (height, width), s in engine.step_s.items())
    logger.info(
        "ready: %d devices of kind %s, %d slots, %s, %s, sampler %s by default, after %.1f s",
        engine.num_devices, engine.device_kind, engine.num_slots, dtype.__name__, sizes, checkpoint.default_sampler,
        time.monotonic() - started,
    )  # fmt: skip
    return _current


def stop_serving() -> None:
    """Close what `start_serving` started, if anything."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def current() -> Serving:
    """Return this process's engine.

    Raises:
        EngineUnavailable: this process has none.
    """
    if _current is None:
        raise EngineUnavailable(
            "no engine runs in this process: sdtpu.generate runs only in a worker with the pool"
            " sdtpu_worker.pool:DevicePool (call sdtpu_worker.install(app), then `celery worker -Q sdtpu`)"
        )
    return _current
