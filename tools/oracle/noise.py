"""Write down the noise that jobs of certain seeds get, for pipelines in PyTorch that are to draw the same pictures.

Run from the repository with the worker's environment, not the oracle's; it takes seconds and writes
`tests/device/golden/noise.npz`, about 60 KB:

    python -m tools.oracle.noise
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from tests.support.picture_cases import SEED
from tests.support.pipeline_cases import LATENT_SHAPE, MOST_ROWS, SEEDS, SHIPPED_LATENT_SHAPE, SHIPPED_PROMPTS

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden" / "noise.npz"


def draw(seed: int, shape: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the initial noise of a job, `shape` float32, and that of its rows, `(rows, *shape)`."""
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(words)
    of_rows = [jax.random.normal(jax.random.fold_in(key, row), shape) for row in range(rows)]
    return np.asarray(jax.random.normal(key, shape)), np.asarray(of_rows, np.float32)


def draw_encoded(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise with which a job's image, and what its mask does not cover, are encoded, `(2, *shape)`."""
    key = jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))
    return np.asarray(jax.random.normal(jax.random.fold_in(key, 2**32 - 1), (2, *shape)))


def draw_all() -> dict[str, np.ndarray]:
    """Return what the file holds, by name."""
    arrays = {}
    for seed in sorted(set(SEEDS.values())):
        arrays[f"initial {seed}"], arrays[f"rows {seed}"] = draw(seed, LATENT_SHAPE, MOST_ROWS)
    shipped = [draw(seed, SHIPPED_LATENT_SHAPE, 0)[0] for seed in range(len(SHIPPED_PROMPTS))]
    return {**arrays, f"encoded {SEED}": draw_encoded(SEED, LATENT_SHAPE), "shipped": np.stack(shipped)}


def main() -> None:
    """Write the file."""
    np.savez_compressed(GOLDEN, allow_pickle=False, **draw_all())
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
