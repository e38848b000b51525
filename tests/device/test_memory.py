"""What loading takes of the host's memory: what the parameters become, and one tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

COUNT, SIDE = 50, 2048
PROGRAM = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from sdtpu_worker.diffusion.weights import read_weights

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder, count, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
shapes = {f"layers.{i}.weight": (side, side) for i in range(count)}
before = peak()
params = read_weights(folder, "unet", shapes, jnp.bfloat16)
print((peak() - before) / sum(array.nbytes for array in params.values()))
"""


@pytest.mark.slow
def test_a_checkpoint_of_half_floats_takes_its_own_size_and_a_tensor(tmp_path):
    block = (0.02 * np.random.default_rng(0).standard_normal((SIDE, SIDE))).astype(np.float16).tobytes()
    (tmp_path / "unet").mkdir()
    names = [f"layers.{i}.weight" for i in range(COUNT)]
    header = json.dumps(
        {
            name: {"dtype": "F16", "shape": [SIDE, SIDE], "data_offsets": [i * len(block), (i + 1) * len(block)]}
            for i, name in enumerate(names)
        }
    ).encode()
    with (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in names:
            file.write(block)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(COUNT), str(SIDE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 1.3
