"""Every error that the project raises on purpose.

    SdtpuError
    ├── InvalidRequest (ValueError)      the client's mistake: a parameter, found at `delay()` or in the worker
    ├── ConfigurationError               the operator's mistake: a setting, a pool, a platform that is not there
    │   └── InvalidCheckpoint            the checkpoint is missing, half-written or of another kind
    ├── GenerationFailed                 the device could not make this image; carries the cause
    ├── SnapshotMismatch                 a parked job's state does not fit this engine; the job starts anew
    ├── EngineUnavailable                the worker's engine has stopped or never started
    ├── BrokerUnavailable (ConnectionError)   Redis cannot be reached; nothing was enqueued
    └── StorageError                     an image could not be stored or is not there any more

Each is built from positional text alone, so that Celery's JSON result backend can rebuild it at the client.
"""


class SdtpuError(Exception):
    """The base of all errors of this package."""


class InvalidRequest(SdtpuError, ValueError):
    """A parameter of a request is not allowed; the text says what was got and what is allowed."""


class ConfigurationError(SdtpuError):
    """A setting or the environment is wrong; the text says which and what to do."""


class InvalidCheckpoint(ConfigurationError):
    """The checkpoint cannot be loaded."""


class GenerationFailed(SdtpuError):
    """The device failed on this job."""


class SnapshotMismatch(SdtpuError):
    """A parked job's state was made by another configuration, or is none."""


class EngineUnavailable(SdtpuError):
    """The engine that should run this job is not running."""


class BrokerUnavailable(SdtpuError, ConnectionError):
    """Redis cannot be reached; nothing was enqueued."""


class StorageError(SdtpuError):
    """An image could not be written or read."""
