"""Every error that the project raises on purpose.

    SdtpuError
    ├── InvalidRequest (ValueError)      the client's mistake: a parameter, found at `delay()` or in the worker
    │   └── InvalidMessage               the task message itself: its size, its JSON, its headers
    ├── Overloaded                       refused at `delay()`; carries when the job would have been done
    │   ├── QueueFull                    more jobs wait than `sdtpu_max_queue` allows
    │   └── DeadlineUnreachable          it would have expired before it had a slot
    ├── ConfigurationError               the operator's mistake: a setting, a pool, a platform that is not there
    │   └── InvalidCheckpoint            the checkpoint is missing, half-written or of another kind
    ├── GenerationFailed                 the device could not make this image; carries the cause
    ├── DeliveryLimitExceeded            the job was on the devices of too many workers that died; names them
    ├── SnapshotMismatch                 a parked job's state does not fit this engine; the job starts anew
    ├── EngineUnavailable                the worker's engine has stopped or never started
    ├── BrokerUnavailable (ConnectionError)   Redis cannot be reached or takes no writes; nothing was enqueued
    └── StorageError                     an image could not be stored or is not there any more

Each is built from positional text alone, so that Celery's JSON result backend can rebuild it at the client.
"""


class SdtpuError(Exception):
    """The base of all errors of this package."""


class InvalidRequest(SdtpuError, ValueError):
    """A parameter of a request is not allowed; the text says what was got and what is allowed."""


class InvalidMessage(InvalidRequest):
    """A task message is too large, is not JSON or has not the shape of Celery's protocol; it was not run."""


class Overloaded(SdtpuError):
    """The job was refused where it was enqueued; nothing was sent.

    Args:
        text: what was found, what is allowed and what to do.
        eta_s: seconds until the job would have been done; None when no worker has reported how fast it is.
    """

    def __init__(self, text: str, eta_s: float | None = None) -> None:
        super().__init__(text, eta_s)
        self.eta_s = eta_s

    def __str__(self) -> str:
        return str(self.args[0])


class QueueFull(Overloaded):
    """More jobs wait in the queue than `sdtpu_max_queue` allows."""


class DeadlineUnreachable(Overloaded):
    """The job clearly could not have a slot before it `expires`."""


class ConfigurationError(SdtpuError):
    """A setting or the environment is wrong; the text says which and what to do."""


class InvalidCheckpoint(ConfigurationError):
    """The checkpoint cannot be loaded."""


class GenerationFailed(SdtpuError):
    """The device failed on this job."""


class DeliveryLimitExceeded(SdtpuError):
    """The job had a slot on `sdtpu_max_deliveries` workers that died or lost their devices; the text names them."""


class SnapshotMismatch(SdtpuError):
    """A parked job's state was made by another configuration, or is none."""


class EngineUnavailable(SdtpuError):
    """The engine that should run this job is not running."""


class BrokerUnavailable(SdtpuError, ConnectionError):
    """Redis cannot be reached, or refuses to take a job; nothing was enqueued, and the text says why."""


class StorageError(SdtpuError):
    """An image could not be written or read."""
