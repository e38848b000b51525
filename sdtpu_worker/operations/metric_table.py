"""Every figure that `/metrics` (of a worker and of the door) and `sdtpu metrics` export, in one table.

It has their names, kinds, units, labels and what they count.

The collectors and the page `docs/reference/metrics.md` are made of this table. Names have base units (seconds, bytes),
counters end in `_total`, and no label has a value that a client can choose: neither a task nor a tenant is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COARSE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
_EIGHTHS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Kind(Enum):
    """What Prometheus calls a type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(Enum):
    """Who exports a figure."""

    WORKER = "a worker, of itself"
    QUEUES = "`sdtpu metrics` and the door, of what Redis has"
    BOTH = "all, with the same values: take the largest of them, not their sum"


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: as Prometheus stores it.
        kind: counter, gauge or histogram.
        unit: of its value, in words; of a histogram, of what is observed.
        help: what it says, in one sentence without its full stop.
        labels: the names of its labels.
        source: who exports it.
        buckets: upper bounds of a histogram, without infinity.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    source: Source = Source.WORKER
    buckets: tuple[float, ...] = ()


def _counter(name: str, unit: str, text: str, *labels: str, source: Source = Source.WORKER) -> Metric:
    return Metric(name, Kind.COUNTER, unit, text, labels, source)


def _gauge(name: str, unit: str, text: str, *labels: str, source: Source = Source.WORKER) -> Metric:
    return Metric(name, Kind.GAUGE, unit, text, labels, source)


def _histogram(name: str, unit: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, unit, text, buckets=buckets)


JOBS = (
    _gauge("sdtpu_requests_running", "jobs", "Jobs that have a slot of a device"),
    _gauge(
        "sdtpu_requests_pending", "jobs",
        "Jobs that the worker holds for its devices and that have no slot now: next in line, or parked",
    ),
    _counter("sdtpu_requests_total", "jobs", "What became of jobs in this worker, see below", "outcome", "reason"),
    _counter("sdtpu_reuse_total", "jobs", "How jobs came to their images with `sdtpu_reuse`, see below", "outcome"),
    _histogram(
        "sdtpu_request_queue_time_seconds", "seconds",
        "From the client's call to the job's slot; where the client has sent no time, from the worker's receipt",
        _COARSE,
    ),
    _histogram(
        "sdtpu_request_inference_time_seconds", "seconds",
        "From the job's slot to its pixels, of jobs that have an image", _COARSE,
    ),
    _histogram(
        "sdtpu_e2e_request_latency_seconds", "seconds",
        "From the client's call to the stored image, of jobs that have one", _COARSE,
    ),
    _histogram("sdtpu_prepare_seconds", "seconds", "The host's work before a slot: tokens, and given pictures", _FINE),
    _histogram("sdtpu_encode_seconds", "seconds", "Writing the pixels as PNG, JPEG or WebP, on the host", _FINE),
    _histogram("sdtpu_store_seconds", "seconds", "Storing the encoded image", _FINE),
)  # fmt: skip
DEVICES = (
    _gauge("sdtpu_devices", "devices", "Devices by state: `working`, or `lost` until the worker starts anew", "state"),
    _gauge("sdtpu_slots", "slots", "Slots of one size over the devices that work"),
    _gauge("sdtpu_slots_busy", "slots", "Slots that hold a job"),
    _counter("sdtpu_images_total", "images", "Images that the devices made"),
    _counter("sdtpu_ticks_total", "ticks", "Ticks that ended without a failure"),
    _histogram("sdtpu_tick_seconds", "seconds", "How long a tick took", _FINE),
    _histogram("sdtpu_tick_occupancy_ratio", "from 0 to 1", "Share of the slots that hold a job in a tick", _EIGHTHS),
    _counter("sdtpu_steps_total", "steps", "Denoising steps that jobs took"),
    _counter(
        "sdtpu_padding_steps_total", "steps",
        "Denoising steps that were computed for a slot without a job that could take them",
    ),
    _counter("sdtpu_active_seconds_total", "seconds", "Time with at least one job for the devices"),
    _counter("sdtpu_busy_slot_seconds_total", "seconds", "Time that slots held a job, summed over the slots"),
    _counter("sdtpu_device_busy_seconds_total", "seconds", "Time that a device had something to do", "device"),
    _histogram("sdtpu_insert_seconds", "seconds", "Putting a job into its slot, with its text encoder", _FINE),
    _histogram("sdtpu_step_seconds", "seconds", "A denoising step of all slots of a device", _FINE),
    _histogram("sdtpu_decode_seconds", "seconds", "Decoding an image from its latents", _FINE),
    _gauge("sdtpu_tick_late_seconds", "seconds", "How late the devices are with the oldest tick; 0 while all is well"),
    _counter("sdtpu_device_failures_total", "failures", "Device programs that failed"),
    _counter("sdtpu_retries_total", "tries", "Times that a job was tried again after a failure of a device"),
    _gauge("sdtpu_device_memory_bytes", "bytes", "Memory of a device: `used`, `peak` or `limit`",
           "device", "kind"),
    _gauge("sdtpu_programs", "programs", "Programs by where they came from: `kept`, `cache` or `compiler`", "origin"),
    _counter("sdtpu_programs_after_ready_total", "programs", "Programs traced or compiled while serving: stays 0"),
)  # fmt: skip
WORKER = (
    _gauge("sdtpu_worker_info", "1", "What the worker is, in its labels",
           "version", "model", "platform", "device_kind", "dtype"),
    _gauge("sdtpu_worker_live", "0 or 1", "Whether `/livez` says ok"),
    _gauge("sdtpu_worker_ready", "0 or 1", "Whether `/readyz` says ok"),
    _gauge("sdtpu_start_seconds", "seconds", "How long each phase of the start took, so far", "phase"),
    _gauge("sdtpu_deliveries_held", "messages", "Messages that the worker holds"),
    _counter("sdtpu_deliveries_redelivered_total", "messages", "Messages of dead workers that this one redelivered"),
    _gauge("sdtpu_lease_age_seconds", "seconds", "Time since the leases of the held messages were renewed"),
    _gauge("sdtpu_lease_seconds", "seconds", "`sdtpu_lease_s`: a message whose lease is older goes to another worker"),
)  # fmt: skip
QUEUES = (
    _gauge(
        "sdtpu_requests_waiting", "jobs", "Jobs that wait in Redis, by the lowest priority number of their band",
        "queue", "priority", source=Source.BOTH,
    ),
    _gauge(
        "sdtpu_oldest_request_seconds", "seconds",
        "How long the next job has been waiting, since it was sent or due; absent where no job waits, or where its"
        " client sends no time", "queue", source=Source.BOTH,
    ),
    _gauge("sdtpu_requests_held", "jobs", "Jobs that workers hold: on the devices, or next in line", "queue",
           source=Source.QUEUES),
    _gauge("sdtpu_requests_deferred", "jobs", "Jobs that wait for their `countdown` or `eta`", "queue",
           source=Source.QUEUES),
    _gauge(
        "sdtpu_queue_wait_estimate_seconds", "seconds",
        "When a new job of the default priority would have a slot; absent while no worker consumes", "queue",
        source=Source.QUEUES,
    ),
    _gauge("sdtpu_workers", "workers", "Workers that have published their load in the last 15 s", source=Source.QUEUES),
    _gauge("sdtpu_host_slots", "slots", "Slots of a worker, as it published them", "host", source=Source.QUEUES),
    _gauge("sdtpu_host_requests_held", "jobs", "Jobs that a worker holds, as it published them", "host",
           source=Source.QUEUES),
    _gauge("sdtpu_host_job_seconds", "seconds", "Mean time that recent jobs of a worker had their slots", "host",
           source=Source.QUEUES),
    _gauge("sdtpu_redis_memory_bytes", "bytes", "Memory of the broker's Redis: `used`, or its `limit` where it has one",
           "kind", source=Source.QUEUES),
    _counter("sdtpu_dead_letters_total", "messages", "Messages that no worker could run, by kind", "kind",
             source=Source.QUEUES),
)  # fmt: skip
METRICS = {metric.name: metric for metric in (*JOBS, *DEVICES, *WORKER, *QUEUES)}
"""All figures by name."""


class Outcome(NamedTuple):
    """What a value of the label `outcome` of `sdtpu_requests_total` says.

    Attributes:
        kind: `end` of the job in this worker, or `passing`.
        meaning: what became of the job.
        reason: what the label `reason` says, in words; empty where it says nothing.
        known: values of `reason` that are exported from the start on, with 0: Prometheus does not see the rise of a
            series that begins with its first job.
    """

    kind: str
    meaning: str
    reason: str = ""
    known: tuple[str, ...] = ("",)


OUTCOMES = {
    "succeeded": Outcome(
        "end", "its image is stored", "`reused` where it is that of an equal job, else empty", ("", "reused"),
    ),
    "failed": Outcome(
        "end", "it ended with an error", "the error's class",
        ("GenerationFailed", "StorageError", "SoftTimeLimitExceeded", "TimeLimitExceeded"),
    ),
    "retried": Outcome(
        "end", "Celery sends it again (`autoretry_for`, `retry`)", "the class of the error that is the cause",
        ("GenerationFailed", "StorageError"),
    ),
    "revoked": Outcome(
        "end", "its client did not want it any more", "`waiting`, or `terminated` with its slot or its place",
        ("waiting", "terminated"),
    ),
    "expired": Outcome("end", "it had no slot before its `expires`"),
    "refused": Outcome(
        "end", "its message, its parameters or its history do not allow it to run", "the error's class",
        ("InvalidRequest", "InvalidMessage", "NotRegistered", "DeliveryLimitExceeded"),
    ),
    "handed_over": Outcome(
        "end", "another worker continues it",
        "`stopping`, `devices` (they are lost or hang), `storage` or `history` (a backend that does not answer)",
        ("stopping", "devices", "storage", "history"),
    ),
    "done_before": Outcome(
        "end", "it came again after its end, which was kept", "its state", ("SUCCESS", "FAILURE", "REVOKED"),
    ),
    "lost_hold": Outcome("end", "it could not be brought to an end; its message is redelivered when the lease expires"),
    "redelivered": Outcome(
        "passing", "it came from another worker",
        "`died` with the job in a slot, `handed_over` with a snapshot, else `requeued`: mostly without a slot yet, also"
        " from a worker that died",
        ("died", "handed_over", "requeued"),
    ),
    "preempted": Outcome("passing", "its state left its slot for another job"),
    "resumed": Outcome("passing", "its state came back into a slot"),
}  # fmt: skip
"""The values of the label `outcome` of `sdtpu_requests_total`."""

REUSES = {
    "drawn": "it was drawn: there was none, and no equal job drew it",
    "stored": "it was that of an equal job, which was there",
    "waited": "it was that of an equal job, for which this one waited",
    "took_over": "it was drawn, after the equal job for which this one waited ended without an image",
    "ahead": "it was drawn beside an equal job that is less urgent",
    "beside": "it was drawn beside an equal job: this one had a snapshot, or too many waited already, or for too long",
    "unknown": "it was drawn because Redis could not be asked",
    "gone": "the image of an equal job was gone, damaged or another one; the job is counted once more",
}
"""The values of the label `outcome` of `sdtpu_reuse_total`: what is said of a job's image."""
