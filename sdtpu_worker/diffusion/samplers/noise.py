"""Noise schedules: signal and noise at every trained timestep, and which of them a sampler visits.

PyTorch keeps its schedules in float32, and models were trained with them so. The first betas are near float32's
resolution of one (a relative error of 7e-5 in the smallest sigma), and some classes round timesteps that they look up
by sigma; so the schedule is rounded here where PyTorch rounds, and everything after it is float64. One difference
stays: multistep solvers cut the timesteps of exponential and beta sigmas to integers, and the first one lies at the
edge between two, where the last bit of PyTorch's square root decides, which is not the same on all machines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdtpu_worker.diffusion.samplers.table import Form, M, X

Options = Mapping[str, Any]
# These two take `sigma_min` and `sigma_max` for exponential and beta sigmas alone.
_KARRAS_OF_WHOLE_RANGE = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")
_LAST_OF_ZERO_SNR = 2.0**-24  # what classes that divide by the signal put in the place of its zero
_CLASSES_WITH_ZERO_SIGNAL = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler")


def signal_levels(options: Options) -> np.ndarray:
    """Return `alphas_cumprod`, `(num_train_timesteps,) float32`, the share of signal variance left at each timestep."""
    betas = _betas(options)
    signal = _cumulative(1 - betas)
    if options.get("rescale_betas_zero_snr"):
        signal = _cumulative(1 - _without_terminal_signal(signal))
        if options["_class_name"] not in _CLASSES_WITH_ZERO_SIGNAL:
            signal[-1] = _LAST_OF_ZERO_SNR
    return signal


def _betas(options: Options) -> np.ndarray:
    count, kind = options["num_train_timesteps"], options["beta_schedule"]
    start, end = float(options["beta_start"]), float(options["beta_end"])
    if options["trained_betas"] is not None:
        return np.asarray(options["trained_betas"], np.float32)
    if kind == "scaled_linear":
        return _linspace32(start**0.5, end**0.5, count) ** 2
    if kind == "squaredcos_cap_v2":  # arXiv 2102.09672, equation 17
        edges = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - edges[1:] / edges[:-1], 0.999).astype(np.float32)
    if kind == "sigmoid":
        return (1 / (1 + np.exp(-_linspace32(-6, 6, count))) * (end - start) + start).astype(np.float32)
    return _linspace32(start, end, count)


def _linspace32(start: float, end: float, count: int) -> np.ndarray:
    """Return evenly spaced float32 numbers, rounded as PyTorch does: each half is counted from its own end."""
    if count == 1:
        return np.array([start], np.float32)
    low, high, index = np.float32(start), np.float32(end), np.arange(count)
    step = float((high - low) / np.float32(count - 1))
    # A fused product and sum is rounded once.
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(np.float32)


def _cumulative(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _without_terminal_signal(signal: np.ndarray) -> np.ndarray:
    """Return betas whose last signal is zero and whose first is kept (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(signal)
    first, last = root[0].copy(), root[-1].copy()
    shifted = ((root - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([shifted[:1], shifted[1:] / shifted[:-1]])


def spaced_integers(options: Options, steps: int) -> np.ndarray:
    """Return `(steps,)` integer timesteps, last first, as DDIM, DDPM, PNDM visit them (arXiv 2305.08891, table 2)."""
    total = options["num_train_timesteps"]
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(int)
    return _leading_or_trailing(options, total, total // steps, steps)


def spaced_floats(options: Options, steps: int) -> np.ndarray:
    """Return `(steps,)` timesteps, last first, as samplers in sigma visit them: with `linspace` they are fractional."""
    total = options["num_train_timesteps"]
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].astype(float)
    return _leading_or_trailing(options, total, total // steps, steps).astype(float)


def spaced_with_end(options: Options, steps: int, total: int) -> np.ndarray:
    """Return `(steps,)` integer timesteps, last first, of `steps + 1` whose last would be zero: DPM-Solver's, UniPC's.

    Args:
        total: how many timesteps there are to choose from.
    """
    spacing = options.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].astype(int)
    if spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + options["steps_offset"]
    return _leading_or_trailing(options, total, 0, steps)


def _leading_or_trailing(options: Options, total: int, ratio: int, steps: int) -> np.ndarray:
    if options["timestep_spacing"] == "leading":
        return np.arange(steps)[::-1] * ratio + options["steps_offset"]
    return np.arange(total, 0, -options["num_train_timesteps"] / steps).round()[:steps].astype(int) - 1


class SigmaSchedule:
    """A schedule told by `sigma`, the noise in units of the signal.

    Attributes:
        options: the sampler's options.
        signal: `alphas_cumprod`.
        sigmas: `(num_train_timesteps,) float32`, by timestep.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.signal = signal_levels(options)
        self.sigmas = np.sqrt((1 - self.signal) / self.signal)
        # Rounded from float64, since NumPy's float32 logarithm may differ between kinds of CPU, and with it the integer
        # that a timestep is cut to.
        self._log_sigmas = np.log(self.sigmas.astype(float)).astype(np.float32)

    def at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the sigmas of timesteps, which may be fractional."""
        return np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)

    def timestep(self, sigma: np.ndarray) -> np.ndarray:
        """Return the fractional timesteps of sigmas, by interpolating in their logarithm."""
        logs = self._log_sigmas
        log_sigma = np.log(np.maximum(sigma, 1e-10))
        # The last sigma may be below the one before it: zero terminal SNR gives it a value of its own.
        below = np.searchsorted(logs[:-1], log_sigma, side="right") - 1
        below = np.clip(np.where(log_sigma >= logs[-1], len(logs), below), 0, len(logs) - 2)
        low, high = logs[below], logs[below + 1]
        weight = np.clip((low - log_sigma) / (low - high), 0, 1)
        return (1 - weight) * below + weight * (below + 1)

    def respaced(self, first: float, last: float, steps: int) -> np.ndarray | None:
        """Return `(steps,)` sigmas between two, as the options ask for, or None where they ask for none."""
        kind, ends = respacing(self.options), sigma_range(self.options, np.array([first, last]))
        if kind != "karras" and self.options.get("use_lu_lambdas"):  # with rho 1, as PyTorch has it, exponential
            kind, ends = "exponential", (first, last)
        if kind == "karras" and self.options["_class_name"] in _KARRAS_OF_WHOLE_RANGE:
            ends = first, last
        return None if kind is None else respace(kind, *ends, steps)


def sigma_range(options: Options, sigmas: np.ndarray) -> tuple[float, float]:
    """Return the first and the last sigma of a path, where the options do not say them those of `sigmas`."""
    low, high = options.get("sigma_min"), options.get("sigma_max")
    return float(sigmas[0] if high is None else high), float(sigmas[-1] if low is None else low)


def respacing(options: Options) -> str | None:
    """Return `karras`, `exponential`, `beta` or None."""
    return next((kind for kind in ("karras", "exponential", "beta") if options[f"use_{kind}_sigmas"]), None)


def respace(kind: str, first: float, last: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Return `(steps,)` sigmas from `first` down to `last`.

    Source: karras: arXiv 2206.00364, equation 5. beta: quantiles of the beta distribution of 0.6 and 0.6, arXiv
    2407.12173.
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    if kind == "exponential":
        return np.exp(np.linspace(math.log(first), math.log(last), steps))
    from scipy.special import betaincinv  # a tenth of a second, which few workers need

    return last + betaincinv(0.6, 0.6, 1 - ramp) * (first - last)


def signal_and_noise(sigma: float) -> tuple[float, float]:
    """Return `(alpha, sigma)` of unit variance for noise in units of the signal."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def predicted_original(prediction_type: str, alpha: float, sigma: float) -> Form:
    """Return the clean sample that the model's output means, for `x = alpha * x0 + sigma * noise`."""
    if prediction_type == "epsilon":
        return (X - sigma * M) / alpha
    return M if prediction_type == "sample" else alpha * X - sigma * M


def predicted_noise(prediction_type: str, alpha: float, sigma: float) -> Form:
    """Return the noise that the model's output means, for `x = alpha * x0 + sigma * noise`."""
    if prediction_type == "epsilon":
        return M
    return (X - alpha * M) / sigma if prediction_type == "sample" else alpha * M + sigma * X


def denoised(prediction_type: str, sigma: float) -> Form:
    """Return the clean sample for `x = x0 + sigma * noise`, where the model sees `x / sqrt(sigma**2 + 1)`."""
    alpha, noise = signal_and_noise(sigma)
    return predicted_original(prediction_type, alpha, noise) * np.array([alpha, 1, 1, 1, 1, 1])
