"""Small images of latents: a linear map to colours, fitted to the checkpoint's own decoder when the engine starts."""

from __future__ import annotations

import numpy as np

PROMPTS = ("red", "green", "blue", "yellow", "white", "black", "a photo of a landscape", "a portrait")
"""What is drawn to fit the map: the images need different colours, and may show anything."""
STEPS = 10


def fit_colours(latents: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return the map that comes closest to the decoder, by least squares.

    Args:
        latents: `(n, C, h, w) float32`, of finished jobs.
        pixels: `(n, height, width, 3) uint8`, what they were decoded to; height and width are multiples of h and w.

    Returns:
        `(C + 1, 3) float32`: what a unit of each latent channel adds to red, green and blue from 0 to 255; the last
        row is the colour of latents that are zero.
    """
    n, channels, h, w = latents.shape
    blocks = pixels.reshape(n, h, pixels.shape[1] // h, w, pixels.shape[2] // w, 3).mean((2, 4))
    rows = np.concatenate([latents.transpose(0, 2, 3, 1), np.ones((n, h, w, 1))], axis=-1)
    colours, *_ = np.linalg.lstsq(rows.reshape(-1, channels + 1), blocks.reshape(-1, 3), rcond=None)
    return colours.astype(np.float32)
