"""What importing a part of the package loads, seen in a fresh process; `lint-imports` checks the source."""

from __future__ import annotations

import subprocess
import sys

import pytest

DEVICE_WORKER = tuple(f"sdtpu_worker.{name}" for name in ("worker", "delivery", "device_loop", "diffusion"))

DJANGO_APP = """
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.messages",
                                   "django.contrib.admin", "sdtpu_worker.contrib.django"])
django.setup()
import sdtpu_worker.contrib.django.admin, sdtpu_worker.contrib.django.urls, sdtpu_worker.contrib.django.keeper
"""


def loaded(code: str, *names: str) -> list[str]:
    """Return which of the modules are loaded, themselves or a part of them, after a fresh process has run the code."""
    report = (
        f"\nimport sys\nprint([name for name in {names} if any((m + '.').startswith(name + '.') for m in sys.modules)])"
    )
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return eval(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sdtpu_worker", ("celery", "kombu", "redis", "jax", "numpy", "PIL", "click", *DEVICE_WORKER)),
        ("import sdtpu_worker.cli", ("celery", "kombu", "redis", "jax", "numpy", *DEVICE_WORKER)),
        ("from sdtpu_worker import *", ("jax", "flax", "numpy", *DEVICE_WORKER)),
        ("from sdtpu_worker.http import create_app", ("jax", "flax", "numpy", "PIL", *DEVICE_WORKER)),
        (
            "import sdtpu_worker.web.jobs_api",
            ("starlette", "uvicorn", "flask", "jax", "numpy", *DEVICE_WORKER),
        ),
        ("from sdtpu_worker.app import app; app.finalize()", ("jax", "flax", "numpy", *DEVICE_WORKER)),
        (
            "from sdtpu_worker.contract import load_report, queues, request, result",
            ("celery", "kombu", "redis", "jax", "numpy", "PIL"),
        ),
        ("import sdtpu_worker.aggregator.policy", ("celery", "kombu", "redis", "jax", "numpy", "PIL")),
        ("import sdtpu_worker.device_loop.loop", ("celery", "kombu", "redis", "jax", "numpy", "PIL")),
        (
            "from sdtpu_worker.contrib.flask import create_blueprint",
            ("jax", "flax", "numpy", "starlette", *DEVICE_WORKER),
        ),
        (DJANGO_APP, ("jax", "flax", "numpy", "starlette", *DEVICE_WORKER)),
        ("from sdtpu_worker.testing import stand_in_worker", ("jax", "flax", "numpy", *DEVICE_WORKER)),
        ("import sdtpu_worker.testing.pytest_plugin", ("jax", "flax", "numpy", *DEVICE_WORKER)),
        ("import sdtpu_worker.testing.fake_engine", ("celery", "kombu", "redis", "jax", "sdtpu_worker.worker")),
    ],
)
def test_importing_a_part_loads_nothing_of_these(code, absent):
    assert loaded(code, *absent) == []


def test_what_is_loaded_is_seen():
    assert loaded("import celery.app", "celery", "kombu", "jax") == ["celery", "kombu"]
