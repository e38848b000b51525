"""The device side without Celery: what importing it loads, seen in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "names", "loaded"),
    [
        ("sdtpu_worker.diffusion.start", ("diffusers", "transformers", "torch", "scipy.special"), []),
        ("sdtpu_worker.diffusion.engine", ("celery", "kombu", "redis", "jax"), ["jax"]),
    ],
    ids=["a start imports no library that it does not need", "the engine loads neither Celery nor Redis"],
)
def test_importing_loads_what_is_needed_and_no_more(module, names, loaded):
    code = f"import sys, {module}; print([name for name in {names} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(loaded)
