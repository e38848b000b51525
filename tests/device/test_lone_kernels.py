"""Kernels that are compiled by themselves: libtpu writes down their instructions and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sdtpu_worker.planning.kernels import dump_options, read_bundles
from tests.support.paths import ROOT
from tests.support.two_kernels import traced_kernels

DESCRIBED = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
             "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip


def test_the_instructions_of_each_kernel_are_written_down_and_no_others(tmp_path: Path):
    env = {**os.environ, **DESCRIBED, "PYTHONPATH": str(ROOT), "LIBTPU_INIT_ARGS": dump_options(tmp_path)}
    command = [sys.executable, "-m", "tests.support.two_kernels"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=100)
    found = read_bundles(tmp_path)
    assert found.keys() == traced_kernels().keys()
    (of_windows,) = (each for key, each in found.items() if key.startswith("packed_attention_of_windows("))
    (dense,) = (each for key, each in found.items() if key.startswith("gated_feed_forward("))
    assert 0 < of_windows.least < of_windows.most
    assert 0 < dense.least == dense.most
    assert len(list(tmp_path.glob("*schedule-analysis_final_bundles.txt"))) == len(found)
