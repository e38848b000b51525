"""What the device side loads beside JAX."""

from __future__ import annotations

import subprocess
import sys


def test_the_engine_does_not_load_celery():
    code = "import sys, sdtpu_worker.diffusion.engine; print('celery' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
