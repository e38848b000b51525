"""The device side without Celery: what importing it loads, seen in a fresh process."""

from __future__ import annotations

import subprocess
import sys


def test_the_engine_loads_neither_celery_nor_redis():
    code = (
        "import sys, sdtpu_worker.diffusion.engine;"
        "print([name for name in ('celery', 'kombu', 'redis', 'jax') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "['jax']"
