"""DEIS and UniPC, multistep solvers over the same noise levels as DPM-Solver."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sdtpu_worker.diffusion.samplers.dpmsolver import order_of_step
from sdtpu_worker.diffusion.samplers.levels import Level, level_path
from sdtpu_worker.diffusion.samplers.noise import Options, predicted_noise, predicted_original
from sdtpu_worker.diffusion.samplers.table import HISTORY, NOTHING, Form, Steps, X, make_row


def deis(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of DEIS with polynomials in log(rho) (arXiv 2204.13902, equation 15).

    The predicted noise is interpolated in the logarithm of `rho = sigma / alpha`, and integrated over `rho`.
    """
    path = level_path(options, steps, lambda sigmas, smallest: float(sigmas[-1]))
    count = len(path.timesteps)
    rho = [level.sigma / level.alpha for level in path.levels]
    nodes, weights = np.polynomial.legendre.leggauss(16)
    rows = []
    for i, t in enumerate(path.timesteps[begin:], begin):
        start, end = path.levels[i], path.levels[i + 1]
        here = predicted_noise(options["prediction_type"], start.alpha, start.sigma)
        known = [math.log(rho[i - k]) for k in range(order_of_step(options, i, count, False, i - begin + 1))]
        # With s = log(rho) the integral is one over exp(s) times a polynomial: 16 points are exact to rounding.
        low, high = math.log(rho[i]), math.log(rho[i + 1])
        points = (high - low) / 2 * nodes + (high + low) / 2
        result = end.alpha / start.alpha * X
        for j, kept in enumerate((here, *HISTORY)[: len(known)]):
            basis = np.prod([(points - s) / (known[j] - s) for k, s in enumerate(known) if k != j], axis=0)
            weight = (high - low) / 2 * float(np.sum(weights * np.exp(points) * basis))
            result = result + end.alpha * weight * kept
        rows.append(make_row(t, result, keep=here))
    return Steps(rows, path.levels_from(begin))


def unipc(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of UniPC (arXiv 2302.04867, algorithms 5 to 8): the last step's corrector, then a predictor.

    The row before predicted `x = start + predicted`; now that the model was asked there, the corrected sample is
    `start + corrected = x - predicted + corrected`, linear in `x`, the new output and the history.
    """
    zero = options["final_sigmas_type"] == "zero"
    path = level_path(options, steps, lambda sigmas, smallest: 0.0 if zero else float(sigmas[-1]))
    count = len(path.timesteps)
    meaning = predicted_original if options["predict_x0"] else predicted_noise
    rows = []
    order = 0
    for i, t in enumerate(path.timesteps[begin:], begin):
        here = meaning(options["prediction_type"], path.levels[i].alpha, path.levels[i].sigma)
        sample = X
        if i > begin and i - 1 not in options["disable_corrector"]:
            before = _Step(options, path.levels, i - 1, order, HISTORY)
            sample = X - before.predictor() + before.corrector(here)
        most = min(options["solver_order"], count - i) if options["lower_order_final"] else options["solver_order"]
        order = min(most, i - begin + 1)
        step = _Step(options, path.levels, i, order, (here, *HISTORY))
        rows.append(make_row(t, step.scale * sample + step.predictor(), keep=here))
    return Steps(rows, path.levels_from(begin))


class _Step:
    """One step of UniPC: the sample's factor, and what the predictor and the corrector add to it.

    Args:
        outputs: at the step's start and before it, newest first.
    """

    def __init__(self, options: Options, levels: Sequence[Level], i: int, order: int, outputs: Sequence[Form]) -> None:
        start, end = levels[i], levels[i + 1]
        h = end.half_log_snr - start.half_log_snr
        original = options["predict_x0"]
        self.scale = end.sigma / start.sigma if original else end.alpha / start.alpha
        self._amplitude = end.alpha if original else end.sigma
        self._h = -h if original else h
        self._order, self._newest = order, outputs[0]
        self._bh1 = options["solver_type"] == "bh1"
        self._ratios = [(levels[i - k].half_log_snr - start.half_log_snr) / h for k in range(1, order)]
        pairs = zip(self._ratios, outputs[1:], strict=False)
        self._slopes = [(output - self._newest) / ratio for ratio, output in pairs]

    def predictor(self) -> Form:
        """Return what the predictor adds to the scaled sample (UniP)."""
        if self._order == 1:
            return self._first_order()
        rho = np.array([0.5]) if self._order == 2 else self._solve(self._ratios)
        return self._first_order() - self._amplitude * self._b() * _sum(rho, self._slopes)

    def corrector(self, output: Form) -> Form:
        """Return what the corrector adds to the scaled sample (UniC), given the model's output at the step's end."""
        rho = np.array([0.5]) if self._order == 1 else self._solve([*self._ratios, 1.0])
        slopes = [*self._slopes, output - self._newest]
        return self._first_order() - self._amplitude * self._b() * _sum(rho, slopes)

    def _first_order(self) -> Form:
        return -self._amplitude * math.expm1(self._h) * self._newest

    def _b(self) -> float:
        return self._h if self._bh1 else math.expm1(self._h)

    def _solve(self, ratios: Sequence[float]) -> np.ndarray:
        """Return the weights of slopes that match the exact integral of every polynomial (arXiv 2302.04867, eq. 8)."""
        h, term, factorial = self._h, math.expm1(self._h) / self._h - 1, 1
        right = []
        for k in range(len(ratios)):
            right.append(term * factorial / self._b())
            factorial *= k + 2
            term = term / h - 1 / factorial
        return np.linalg.solve(np.vander(ratios, increasing=True).T, right)


def _sum(weights: np.ndarray, forms: Sequence[Form]) -> Form:
    return sum((weight * form for weight, form in zip(weights, forms, strict=True)), NOTHING)
