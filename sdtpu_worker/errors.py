"""Every error that the project raises on purpose.

    SdtpuError
    ├── InvalidRequest (ValueError)      the client's mistake: a parameter, found at `delay()` or in the worker
    │   └── InvalidMessage               the task message itself is wrong: its size, its JSON, its headers
    ├── Overloaded                       refused at `delay()`; says when the job would have been done
    │   ├── QueueFull                    more jobs wait than `sdtpu_max_queue` allows
    │   └── DeadlineUnreachable          the job would have expired before it had a slot
    ├── ConfigurationError               the operator's mistake: a setting, a pool, a platform that is missing
    │   └── InvalidCheckpoint            the checkpoint is missing, half-written or of another kind
    ├── GenerationFailed                 the devices could not make this image; the text has the cause
    ├── DeliveryLimitExceeded            the job was on the devices of too many workers that died; names them
    ├── SnapshotMismatch                 a snapshot does not fit this engine; the job starts from its first step
    ├── EngineUnavailable                the worker's engine has stopped or never started
    ├── BrokerUnavailable (ConnectionError)   Redis cannot be reached or takes no writes; nothing was done
    └── StorageError                     an image could not be stored, or cannot be read any more

Each is built from positional arguments alone, so that Celery's JSON result backend can rebuild it at the client.
"""


class SdtpuError(Exception):
    """The base of all errors of this package."""


class InvalidRequest(SdtpuError, ValueError):
    """A parameter of a request is not allowed; the text says what was got and what is allowed."""


class InvalidMessage(InvalidRequest):
    """A task message is too large, is not JSON or does not follow Celery's protocol; no job was run."""


class Overloaded(SdtpuError):
    """The client refused to enqueue the job; nothing was sent.

    Args:
        text: what was found, what is allowed and what to do.
        eta_s: seconds until the job would have been done; None when no worker has published its load.
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
    """A setting or the environment is wrong; the text says which one and what to do."""


class InvalidCheckpoint(ConfigurationError):
    """The checkpoint cannot be loaded."""


class GenerationFailed(SdtpuError):
    """The devices failed on this job; the text has the cause."""


class DeliveryLimitExceeded(SdtpuError):
    """The job had a slot on `sdtpu_max_deliveries` workers that died or lost their devices; the text names them."""


class SnapshotMismatch(SdtpuError):
    """A snapshot was made by another configuration, or is not a snapshot at all."""


class EngineUnavailable(SdtpuError):
    """The engine of this process has stopped or was never started."""


class BrokerUnavailable(SdtpuError, ConnectionError):
    """Redis cannot be reached or does not take the job; nothing was enqueued, and the text says why."""


class StorageError(SdtpuError):
    """An image could not be stored or read."""
