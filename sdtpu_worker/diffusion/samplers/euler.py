"""Samplers in sigma, the noise in units of the signal: Euler, Euler ancestral, Heun, LMS, DPM2, and EDM's Euler.

Here `x = x0 + sigma * noise`, the model sees `x / sqrt(sigma**2 + 1)`, and the ODE is `dx/dsigma = (x - x0) / sigma`.
Source: arXiv 2206.00364; crowsonkb/k-diffusion names the samplers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdtpu_worker.diffusion.samplers.noise import (
    Options,
    SigmaSchedule,
    denoised,
    respace,
    respacing,
    sigma_range,
    spaced_floats,
)
from sdtpu_worker.diffusion.samplers.table import H1, HISTORY, Form, M, Steps, X, Z, make_row


@dataclass(frozen=True)
class SigmaPath:
    """What a sampler in sigma visits.

    Attributes:
        timesteps: `(n,)`, what the model is told.
        sigmas: `(n + 1,)`, the last one is where the path ends.
        init_noise_sigma: what the initial unit noise is multiplied by.
        schedule: finds the timesteps of sigmas in between.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    init_noise_sigma: float
    schedule: SigmaSchedule

    def steps_from(self, begin: int) -> list[tuple[float, float, float]]:
        """Return `(timestep, sigma, next sigma)` of every step from the number `begin` on."""
        return list(zip(self.timesteps, self.sigmas, self.sigmas[1:], strict=False))[begin:]

    def levels_from(self, begin: int) -> list[tuple[float, float]]:
        """Return `(alpha, sigma)` where the steps from the number `begin` on start."""
        return levels_of([sigma for _, sigma, _ in self.steps_from(begin)])


def levels_of(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """Return `(alpha, sigma)` of samples `x0 + sigma*noise`."""
    return [(1.0, float(sigma)) for sigma in sigmas]


def two_stage_levels(path: SigmaPath, begin: int) -> list[tuple[float, float]]:
    """Return the levels of rows, two a step and one for a last step to zero: PyTorch's classes know no middle."""
    levels = []
    for _, sigma, end in path.steps_from(begin):
        levels += [sigma, end] if end > 0 else [sigma]
    return levels_of(levels)


def sigma_path(options: Options, steps: int, end: float | None = 0.0, round_respaced: bool = False) -> SigmaPath:
    """Return the path of a sampler in sigma.

    Args:
        end: the last sigma, None for the schedule's smallest.
        round_respaced: timesteps of Karras sigmas are rounded.
    """
    schedule = SigmaSchedule(options)
    timesteps = spaced_floats(options, steps)
    sigmas = schedule.at(timesteps)
    if options.get("interpolation_type") == "log_linear":
        first, last = (math.log(schedule.sigmas[i]) for i in (-1, 0))
        sigmas = np.exp(np.linspace(first, last, steps + 1))
    if "use_karras_sigmas" in options:
        respaced = schedule.respaced(float(sigmas[0]), float(sigmas[-1]), steps)
        if respaced is not None:
            sigmas, timesteps = respaced, schedule.timestep(respaced)
            if round_respaced and respacing(options) == "karras":
                timesteps = timesteps.round()
    last_sigma = float(schedule.sigmas[0]) if end is None else end
    sigmas = np.append(sigmas, last_sigma).astype(np.float32).astype(float)
    top = float(sigmas.max())
    unit = options["timestep_spacing"] == "leading"
    return SigmaPath(timesteps, sigmas, math.sqrt(top**2 + 1) if unit else top, schedule)


def slope(options: Options, sigma: float) -> Form:
    """Return `dx/dsigma`, `(x - x0) / sigma`."""
    return (X - denoised(options["prediction_type"], sigma)) / sigma


def c_in(sigma: float) -> float:
    """Return the factor of the model's input."""
    return 1 / math.sqrt(sigma**2 + 1)


def ancestral(sigma: float, next_sigma: float) -> tuple[float, float]:
    """Return `(down, up)`: a step goes to `down` and adds `up` of noise, so that it arrives at `next_sigma`."""
    up = next_sigma * math.sqrt(max(1 - (next_sigma / sigma) ** 2, 0.0))
    return next_sigma**2 / sigma, up


def euler(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of Euler's method (arXiv 2206.00364, algorithm 2 without churn)."""
    path = sigma_path(options, steps, 0.0 if options["final_sigmas_type"] == "zero" else None)
    if options["timestep_type"] == "continuous" and options["prediction_type"] == "v_prediction":
        path = replace(path, timesteps=0.25 * np.log(path.sigmas[:-1]))
    rows = []
    for t, sigma, end in path.steps_from(begin):
        rows.append(make_row(t, X + (end - sigma) * slope(options, sigma), c_in=c_in(sigma)))
    return Steps(rows, path.levels_from(begin), path.init_noise_sigma)


def euler_ancestral(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of Euler's method with ancestral noise."""
    path = sigma_path(options, steps)
    rows = []
    for t, sigma, end in path.steps_from(begin):
        down, up = ancestral(sigma, end)
        rows.append(make_row(t, X + (down - sigma) * slope(options, sigma) + up * Z, c_in=c_in(sigma)))
    return Steps(rows, path.levels_from(begin), path.init_noise_sigma)


def heun(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of Heun's method (arXiv 2206.00364, algorithm 1): two a step, one for the last.

    The first row keeps its slope `h1` and goes to `x + dt*h1`, so the second restarts from `x - dt*h1`.
    """
    path = sigma_path(options, steps)
    rows = []
    for i, (_, sigma, end) in enumerate(path.steps_from(begin), begin):
        dt, here = end - sigma, slope(options, sigma)
        rows.append(make_row(path.timesteps[i], X + dt * here, keep=here, c_in=c_in(sigma)))
        if end > 0:
            there = slope(options, end)
            rows.append(make_row(path.timesteps[i + 1], X - dt * H1 + dt * (H1 + there) / 2, c_in=c_in(end)))
    return Steps(rows, two_stage_levels(path, begin), path.init_noise_sigma)


def lms(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of the linear multistep method of order 4: a polynomial through the last slopes, integrated.

    PyTorch's class takes the order from the number of the step, also where a picture's path begins: the slopes that it
    does not have count as zero there.
    """
    path = sigma_path(options, steps)
    nodes, weights = np.polynomial.legendre.leggauss(3)  # exact for polynomials up to degree 5
    rows = []
    for i, (_, sigma, end) in enumerate(path.steps_from(begin), begin):
        here = slope(options, sigma)
        known = path.sigmas[i::-1][:4]
        points = (end - sigma) / 2 * nodes + (end + sigma) / 2
        result = X
        for j, kept in enumerate((here, *HISTORY)[: min(len(known), i - begin + 1)]):
            basis = np.prod([(points - s) / (known[j] - s) for k, s in enumerate(known) if k != j], axis=0)
            result = result + float((end - sigma) / 2 * np.sum(weights * basis)) * kept
        rows.append(make_row(path.timesteps[i], result, keep=here, c_in=c_in(sigma)))
    return Steps(rows, path.levels_from(begin), path.init_noise_sigma)


def dpm2(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of DPM-Solver-2 in sigma (arXiv 2206.00927, section 3): two a step, one for the last."""
    return _midpoint(options, steps, begin, with_noise=False)


def dpm2_ancestral(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of DPM-Solver-2 with ancestral noise: two a step, one for the last."""
    return _midpoint(options, steps, begin, with_noise=True)


def _midpoint(options: Options, steps: int, begin: int, with_noise: bool) -> Steps:
    """Return rows through the middle, in the logarithm, of each step; the restart is as Heun's."""
    path = sigma_path(options, steps, round_respaced=True)
    rows = []
    for t, sigma, end in path.steps_from(begin):
        here = slope(options, sigma)
        if end == 0:
            rows.append(make_row(t, X - sigma * here, c_in=c_in(sigma)))
            continue
        down, up = ancestral(sigma, end) if with_noise else (end, 0.0)
        middle = math.sqrt(sigma * down)
        rows.append(make_row(t, X + (middle - sigma) * here, keep=here, c_in=c_in(sigma)))
        t_middle = float(path.schedule.timestep(np.array(middle)))
        result = X - (middle - sigma) * H1 + (down - sigma) * slope(options, middle) + up * Z
        rows.append(make_row(t_middle, result, c_in=c_in(middle)))
    return Steps(rows, two_stage_levels(path, begin), path.init_noise_sigma)


def flow_match_euler(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return Euler's rows for flow matching, where `x = (1 - sigma) * x0 + sigma * noise` and `m` is `noise - x0`."""
    total, shift = options["num_train_timesteps"], float(options["shift"])

    def shifted(sigma: np.ndarray) -> np.ndarray:
        return shift * sigma / (1 + (shift - 1) * sigma)

    ends = shifted(np.array([1.0, 1 / total]))
    sigmas = shifted(np.linspace(ends[0], ends[1], steps))
    kind = respacing(options)
    if kind is not None:
        sigmas = respace(kind, *sigma_range(options, sigmas), steps)
    sigmas = np.append(sigmas, 0.0)[begin:]
    rows = []
    for sigma, end in itertools.pairwise(sigmas):
        result = X + (end - sigma) * M
        if options["stochastic_sampling"]:
            result = (1 - end) * (X - sigma * M) + end * Z
        rows.append(make_row(sigma * total, result))
    return Steps(rows, [(1 - float(sigma), float(sigma)) for sigma in sigmas[:-1]])


def edm_sigmas(options: Options, steps: int, last: float | None = None) -> np.ndarray:
    """Return `(steps + 1,)` sigmas of EDM's own schedule (arXiv 2206.00364, equation 5).

    Args:
        last: the last sigma with `final_sigmas_type` `sigma_min`; None for that of the last step.
    """
    low, high = float(options["sigma_min"]), float(options["sigma_max"])
    if options["sigma_schedule"] == "karras":
        sigmas = respace("karras", high, low, steps, float(options["rho"]))
    else:  # with one step PyTorch's class starts at the lower end
        sigmas = respace("exponential", high, low, steps) if steps > 1 else np.array([low])
    end = 0.0 if options["final_sigmas_type"] == "zero" else (float(sigmas[-1]) if last is None else last)
    return np.append(sigmas, end).astype(np.float32).astype(float)


def edm_denoised(options: Options, sigma: float) -> Form:
    """Return the clean sample for a preconditioned model (arXiv 2206.00364, table 1)."""
    data = float(options["sigma_data"])
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
    return c_skip * X + (c_out if options["prediction_type"] == "epsilon" else -c_out) * M


def edm_input(options: Options, sigma: float) -> tuple[float, float]:
    """Return `(t, c_in)`, what a preconditioned model is told and the factor of its input."""
    return 0.25 * math.log(sigma), 1 / math.sqrt(sigma**2 + float(options["sigma_data"]) ** 2)


def edm_euler(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of Euler's method for a preconditioned model (EDM)."""
    sigmas = edm_sigmas(options, steps)[begin:]
    rows = []
    for sigma, end in itertools.pairwise(sigmas):
        t, factor = edm_input(options, sigma)
        here = (X - edm_denoised(options, sigma)) / sigma
        rows.append(make_row(t, X + (end - sigma) * here, c_in=factor))
    return Steps(rows, levels_of(sigmas[:-1].tolist()), math.sqrt(float(options["sigma_max"]) ** 2 + 1))
