"""What `import sdtpu_worker` costs a web server, and the names that it gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdtpu_worker


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_creates_no_celery_app():
    code = "import sdtpu_worker.client.task, sdtpu_worker.plugin, celery; print(len(celery._state._get_active_apps()))"
    assert run_python(code) == "0"


def test_the_public_names_are_these():
    assert sorted(sdtpu_worker.__all__) == [
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
    for name in sdtpu_worker.__all__:
        assert getattr(sdtpu_worker, name).__doc__
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = sdtpu_worker.nothing_like_it
