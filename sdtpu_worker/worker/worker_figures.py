"""What `/metrics` reads from the parts of a worker when somebody asks: they count it anyway. Any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sdtpu_worker
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.operations.figures import Readings
from sdtpu_worker.operations.health import WorkerHealth

if TYPE_CHECKING:
    from sdtpu_worker.worker.serving import Serving


def health_figures(health: WorkerHealth) -> Readings:
    """Return the verdicts on the worker, and how long its start took."""
    return {
        "sdtpu_worker_live": float(all(check.ok for check in health.live())),
        "sdtpu_worker_ready": float(all(check.ok for check in health.ready())),
        "sdtpu_start_seconds": {(phase,): seconds for phase, seconds in health.start_s().items()},
    }


def serving_figures(serving: Serving) -> Readings:
    """Return what the engine and the device loop say of themselves."""
    engine, info, stats = serving.engine, serving.engine.info, serving.loop.stats
    running, pending = serving.counts()
    lost = len(stats.lost_devices)
    facts = (sdtpu_worker.__version__, info.model, info.platform, info.device_kind, info.dtype)
    return {
        "sdtpu_worker_info": {facts: 1.0},
        "sdtpu_requests_running": running,
        "sdtpu_requests_pending": pending,
        "sdtpu_devices": {("working",): info.num_devices - lost, ("lost",): lost},
        "sdtpu_slots": serving.num_slots,
        "sdtpu_slots_busy": running,
        "sdtpu_images_total": stats.images,
        "sdtpu_ticks_total": stats.ticks,
        "sdtpu_steps_total": stats.job_steps,
        "sdtpu_padding_steps_total": max(0, stats.steps * info.slots_per_device - stats.job_steps),
        "sdtpu_active_seconds_total": stats.active_s,
        "sdtpu_busy_slot_seconds_total": stats.occupied_slot_s,
        "sdtpu_device_busy_seconds_total": {(str(i),): busy_s for i, busy_s in enumerate(stats.device_busy_s)},
        "sdtpu_tick_late_seconds": serving.loop.stalled_s,
        "sdtpu_device_failures_total": stats.failures,
        "sdtpu_retries_total": stats.retried,
        "sdtpu_device_memory_bytes": {
            (str(device), kind): count for device, kinds in engine.memory().items() for kind, count in kinds.items()
        },
        "sdtpu_programs": {
            ("kept",): info.kept_programs,
            ("cache",): info.cache_hits,
            ("compiler",): info.cache_misses,
        },
        "sdtpu_programs_after_ready_total": engine.traces_since_ready,
    }


def delivery_figures(deliveries: Deliveries, lease: Lease) -> Readings:
    """Return what the worker knows of the messages that it holds, and of those that it moved."""
    return {
        "sdtpu_deliveries_held": len(deliveries),
        "sdtpu_deliveries_redelivered_total": deliveries.redelivered,
        "sdtpu_lease_age_seconds": lease.age_s,
        "sdtpu_lease_seconds": deliveries.lease_s,
    }
