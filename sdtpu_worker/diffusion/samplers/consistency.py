"""Few-step samplers of distilled models: LCM and TCD."""

from __future__ import annotations

import math

import numpy as np

from sdtpu_worker.diffusion.samplers.noise import Options, predicted_noise, predicted_original, signal_levels
from sdtpu_worker.diffusion.samplers.table import Steps, X, Z, make_row
from sdtpu_worker.errors import InvalidRequest


def _timesteps(options: Options, steps: int) -> list[int]:
    """Return `steps` of the timesteps that the model was distilled at, last first.

    Raises:
        InvalidRequest: there are fewer.
    """
    origin = options["original_inference_steps"]
    if steps > origin:
        raise InvalidRequest(
            f"num_inference_steps must be 1 to {origin} (original_inference_steps in the scheduler config, what the"
            f" model was distilled at), got {steps}"
        )
    distilled = np.arange(1, origin + 1)[::-1] * (options["num_train_timesteps"] // origin) - 1
    return [int(t) for t in distilled[np.floor(np.linspace(0, origin, steps, endpoint=False)).astype(int)]]


def lcm(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return LCM's rows (arXiv 2310.04378, algorithm 3): a clean sample, and new noise on it."""
    signal, timesteps = signal_levels(options).astype(float), _timesteps(options, steps)[begin:]
    rows = []
    for i, t in enumerate(timesteps):
        alpha, sigma = math.sqrt(signal[t]), math.sqrt(1 - signal[t])
        scaled = t * float(options["timestep_scaling"])
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        clean = c_out * predicted_original(options["prediction_type"], alpha, sigma) + c_skip * X
        if i + 1 < len(timesteps):
            then = signal[timesteps[i + 1]]
            clean = math.sqrt(then) * clean + math.sqrt(1 - then) * Z
        rows.append(make_row(t, clean))
    return Steps(rows, _levels(signal, timesteps))


def tcd(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return TCD's rows (arXiv 2402.19159, algorithm 4): a jump to below the next timestep, and noise up to it.

    `eta` is the paper's gamma: how far below.
    """
    signal, timesteps = signal_levels(options).astype(float), _timesteps(options, steps)[begin:]
    kind = options["prediction_type"]
    rows = []
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        next_t = 0 if last else timesteps[i + 1]
        below = signal[math.floor(np.float32(1 - eta) * np.float32(next_t))]
        alpha, sigma = math.sqrt(signal[t]), math.sqrt(1 - signal[t])
        original, noise = predicted_original(kind, alpha, sigma), predicted_noise(kind, alpha, sigma)
        result = math.sqrt(below) * original + math.sqrt(1 - below) * noise
        if eta > 0 and not last:
            then = signal[next_t] / below
            result = math.sqrt(then) * result + math.sqrt(1 - then) * Z
        rows.append(make_row(t, result))
    return Steps(rows, _levels(signal, timesteps))


def _levels(signal: np.ndarray, timesteps: list[int]) -> list[tuple[float, float]]:
    return [(math.sqrt(signal[t]), math.sqrt(1 - signal[t])) for t in timesteps]
