"""DPM-Solver and DPM-Solver++ as multistep methods, and what all forms of DPM-Solver share.

With `lambda = log(alpha / sigma)` a step from one noise level to another takes `x' = scale*x + sum of weights*outputs`,
where an output is the predicted clean sample (`++`) or the predicted noise. Source: arXiv 2206.00927, 2211.01095.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdtpu_worker.diffusion.samplers.euler import edm_denoised, edm_input, edm_sigmas, levels_of
from sdtpu_worker.diffusion.samplers.levels import Level, LevelPath, level_path
from sdtpu_worker.diffusion.samplers.noise import Options, predicted_noise, predicted_original, signal_levels
from sdtpu_worker.diffusion.samplers.table import HISTORY, Form, Steps, X, Z, make_row


@dataclass(frozen=True)
class Expansion:
    """The coefficients of one step's Taylor expansion in `lambda`.

    Attributes:
        length: of the step, in `lambda`.
        scale: of the sample.
        zeroth: of the output where the step starts.
        middle: of the output's slope times the length, by the midpoint rule.
        first: the same, exactly integrated.
        second: of the output's curvature times the length squared.
        noise: standard deviation of the noise that is added.
    """

    length: float
    scale: float
    zeroth: float
    middle: float
    first: float
    second: float
    noise: float

    @classmethod
    def of(cls, algorithm: str, start: Level, end: Level) -> Expansion:
        """Return the expansion of a step between two levels; the end may be without noise for `++`."""
        h = end.half_log_snr - start.half_log_snr
        stochastic = algorithm.startswith("sde-")
        if algorithm.endswith("++"):
            u = -2 * h if stochastic else -h
            scale = end.sigma / start.sigma * (math.exp(-h) if stochastic else 1)
            amplitude, noise = end.alpha, end.sigma * math.sqrt(max(-math.expm1(-2 * h), 0.0))
        else:
            u, scale = h, end.alpha / start.alpha
            amplitude, noise = end.sigma * (2 if stochastic else 1), end.sigma * math.sqrt(max(math.expm1(2 * h), 0.0))
        zeroth, first, second = (-amplitude * phi for phi in _phis(u))
        if algorithm == "sde-dpmsolver++":
            second -= amplitude  # PyTorch's class subtracts one half where one half is to be added
        return cls(h, scale, zeroth, zeroth / 2, first, second, noise if stochastic else 0.0)


def _phis(u: float) -> tuple[float, float, float]:
    """Return `expm1(u)`, `expm1(u)/u - 1` and `(expm1(u) - u)/u**2 - 1/2`."""
    if u == -math.inf:
        return -1.0, -1.0, -0.5
    gain = math.expm1(u)
    if abs(u) < 1e-4:  # the differences would lose their digits
        return gain, u / 2 + u**2 / 6, u / 6 + u**2 / 24
    return gain, gain / u - 1, (gain - u) / u**2 - 0.5


def output(options: Options, level: Level) -> Form:
    """Return what the model's output means for the options' algorithm."""
    original = options["algorithm_type"].endswith("++")
    return (predicted_original if original else predicted_noise)(options["prediction_type"], level.alpha, level.sigma)


def order_of_step(options: Options, i: int, count: int, first_at_end: bool, known: int) -> int:
    """Return the order of a multistep solver's step: few outputs are known at the start, few steps ask for care.

    Args:
        first_at_end: the last step is of the first order, however many steps there are.
        known: outputs, the step's own included.
    """
    careful = options["lower_order_final"] and count < 15
    order = min(options["solver_order"], known)
    if i == count - 1 and (careful or first_at_end):
        return 1
    return min(order, 2) if i == count - 2 and careful else order


def multistep_result(options: Options, levels: Sequence[Level], i: int, order: int, here: Form) -> Form:
    """Return `x'` of a multistep solver's step from `levels[i]`, with the earlier outputs in the history."""
    step = Expansion.of(options["algorithm_type"], levels[i], levels[i + 1])
    result = step.scale * X + step.zeroth * here + step.noise * Z
    h = step.length
    back = [levels[i - k].half_log_snr - levels[i - k - 1].half_log_snr for k in range(order - 1)]
    if 0 in back:  # as many steps as timesteps: one is visited twice, which tells nothing of a slope
        order = back.index(0) + 1
    if order == 1:
        return result
    slope = (here - HISTORY[0]) * (h / back[0])
    if order == 2:
        return result + (step.first if options["solver_type"] == "heun" else step.middle) * slope
    older = (HISTORY[0] - HISTORY[1]) * (h / back[1])
    bend = slope - older
    slope = slope + back[0] / (back[0] + back[1]) * bend
    return result + step.first * slope + step.second * (h / (back[0] + back[1])) * bend


def multistep(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of the multistep solver (arXiv 2211.01095, algorithm 2)."""
    path = solver_path(options, steps)
    levels, count = path.levels, len(path.timesteps)
    first_at_end = options["euler_at_final"] or options["final_sigmas_type"] == "zero"
    rows = []
    for i, t in enumerate(path.timesteps[begin:], begin):
        here, order = output(options, levels[i]), order_of_step(options, i, count, first_at_end, i - begin + 1)
        rows.append(make_row(t, multistep_result(options, levels, i, order, here), keep=here))
    return Steps(rows, path.levels_from(begin))


def edm_multistep(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of the multistep solver for a preconditioned model (EDM), where alpha is one."""
    sigmas = edm_sigmas(options, steps, last=float(options["sigma_min"]))
    levels = [Level(1.0, sigma) for sigma in sigmas]
    first_at_end = options["euler_at_final"] or options["final_sigmas_type"] == "zero"
    rows = []
    for i, sigma in enumerate(sigmas[begin:-1], begin):
        (t, factor), here = edm_input(options, sigma), edm_denoised(options, sigma)
        order = order_of_step(options, i, steps, first_at_end, i - begin + 1)
        rows.append(make_row(t, multistep_result(options, levels, i, order, here), keep=here, c_in=factor))
    return Steps(rows, levels_of(sigmas[begin:-1].tolist()), math.sqrt(float(options["sigma_max"]) ** 2 + 1))


def solver_path(options: Options, steps: int) -> LevelPath:
    """Return what DPM-Solver visits; `lambda_min_clipped` leaves out the noisiest timesteps."""
    total, clip = options["num_train_timesteps"], float(options["lambda_min_clipped"])
    if clip > -math.inf:
        signal = signal_levels(options)
        total -= int(np.sum(0.5 * (np.log(signal) - np.log(1 - signal)) < clip))
    zero = options["final_sigmas_type"] == "zero"
    return level_path(options, steps, lambda sigmas, smallest: 0.0 if zero else smallest, max(total, 1))
