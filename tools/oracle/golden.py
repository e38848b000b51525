"""How the scripts that draw pictures with PyTorch begin and end: one thread, the worker's noise, a golden file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden"


def read_noise() -> Mapping[str, np.ndarray]:
    """Return what is random in all pictures, as `tools/oracle/noise.py` has written it; silence the libraries."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    with np.load(GOLDEN / "noise.npz") as file:
        return dict(file)


def write_pictures(name: str, draw: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]) -> None:
    """Draw pictures and write them into a golden file, as `pixels` (pictures, height, width, 3) uint8.

    Args:
        name: of the file.
        draw: makes the pictures from what `read_noise` returns.
    """
    noise = read_noise()
    with torch.no_grad():
        pixels = draw(noise)
    np.savez_compressed(GOLDEN / name, allow_pickle=False, pixels=np.stack(pixels))
    print(f"{len(pixels)} pictures")
