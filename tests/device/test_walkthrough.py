"""The engine on its own, as `examples/walkthrough.py` shows it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.support.paths import ROOT, XLA_CACHE


@pytest.mark.slow
def test_the_walkthrough_runs_to_its_end_and_writes_its_grids(tmp_path, random_checkpoint):
    command = [sys.executable, str(ROOT / "examples" / "walkthrough.py"), "--out", str(tmp_path), "--steps", "2"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": XLA_CACHE, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--model", str(random_checkpoint)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1. 8 devices of kind cpu" in done.stdout
    assert "deprecated" not in done.stderr
    grids = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert grids == {
        "one-prompt": (64, 8),
        "two-prompts": (32, 16),
        "eight-prompts": (32, 16),
        "two-per-device": (64, 16),
        "mixed": (64, 16),
    }
