"""Single-prompt image jobs on Celery, generated in full-device batches on a TPU host.

The whole public API of the client side. Names are imported on first use, so that `import sdtpu_worker` costs next
to nothing and neither Celery's machinery nor JAX is loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdtpu_worker.client.many import generate_many
    from sdtpu_worker.client.task import generate
    from sdtpu_worker.contract.request import GenerationRequest
    from sdtpu_worker.contract.result import GenerationResult
    from sdtpu_worker.errors import (
        BrokerUnavailable,
        ConfigurationError,
        DeadlineUnreachable,
        DeliveryLimitExceeded,
        EngineUnavailable,
        GenerationFailed,
        InvalidCheckpoint,
        InvalidMessage,
        InvalidRequest,
        Overloaded,
        QueueFull,
        SdtpuError,
        StorageError,
    )
    from sdtpu_worker.images.decode import image_content_type
    from sdtpu_worker.images.encode import image_grid
    from sdtpu_worker.images.store import open_image, read_image_bytes
    from sdtpu_worker.plugin import install

_HOMES = {
    "generate": "client.task",
    "generate_many": "client.many",
    "install": "plugin",
    "open_image": "images.store",
    "read_image_bytes": "images.store",
    "image_grid": "images.encode",
    "image_content_type": "images.decode",
    "GenerationRequest": "contract.request",
    "GenerationResult": "contract.result",
    "BrokerUnavailable": "errors",
    "SdtpuError": "errors",
    "InvalidRequest": "errors",
    "InvalidMessage": "errors",
    "Overloaded": "errors",
    "QueueFull": "errors",
    "DeadlineUnreachable": "errors",
    "DeliveryLimitExceeded": "errors",
    "ConfigurationError": "errors",
    "InvalidCheckpoint": "errors",
    "GenerationFailed": "errors",
    "EngineUnavailable": "errors",
    "StorageError": "errors",
}
__all__ = [
    "BrokerUnavailable",
    "ConfigurationError",
    "DeadlineUnreachable",
    "DeliveryLimitExceeded",
    "EngineUnavailable",
    "GenerationFailed",
    "GenerationRequest",
    "GenerationResult",
    "InvalidCheckpoint",
    "InvalidMessage",
    "InvalidRequest",
    "Overloaded",
    "QueueFull",
    "SdtpuError",
    "StorageError",
    "generate",
    "generate_many",
    "image_content_type",
    "image_grid",
    "install",
    "open_image",
    "read_image_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
