"""DPM-Solver and DPM-Solver++ as singlestep methods, and DPM++ SDE, whose steps have two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sdtpu_worker.diffusion.samplers.dpmsolver import Expansion, output, solver_path
from sdtpu_worker.diffusion.samplers.euler import ancestral, c_in, sigma_path, two_stage_levels
from sdtpu_worker.diffusion.samplers.levels import Level
from sdtpu_worker.diffusion.samplers.noise import Options, denoised
from sdtpu_worker.diffusion.samplers.table import H1, HISTORY, NOTHING, Form, Steps, X, Z, make_row


def singlestep(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of the singlestep solver (arXiv 2211.01095, algorithm 1): blocks of rows of order 1, 2, 3.

    Every row of a block restarts from the block's first sample `s`. Without noise the row before made
    `x = scale*s + sum of weights*outputs`, so `s` is known from `x` and the history. With noise, blocks have two rows,
    and the first one keeps what the second needs of `s` and the output there.
    """
    path = solver_path(options, steps)
    # Where a picture's path begins, no order is higher than the number of outputs that are known.
    orders = [min(order, max(i - begin, 0) + 1) for i, order in enumerate(_orders(options, steps))]
    stochastic = options["algorithm_type"].startswith("sde-")
    rows = []
    scale, weights = 1.0, [0.0]
    for i, (t, order) in list(enumerate(zip(path.timesteps, orders, strict=True)))[begin:]:
        here = keep = output(options, path.levels[i])
        start = X if order == 1 else (X - _sum(weights, HISTORY)) / scale
        scale, weights, noise = _block_step(options, path.levels, i, order)
        if stochastic and order == 2:
            result = H1 + weights[0] * here
        else:
            result = scale * start + _sum(weights, (here, *HISTORY))
        if stochastic and orders[i + 1 : i + 2] == [2]:
            next_scale, next_weights, _ = _block_step(options, path.levels, i + 1, 2)
            keep = next_scale * X + next_weights[1] * here
        rows.append(make_row(t, result + noise * Z, keep=keep))
    return Steps(rows, path.levels_from(begin))


def _sum(weights: Sequence[float], forms: Sequence[Form]) -> Form:
    return sum((weight * form for weight, form in zip(weights, forms, strict=False)), NOTHING)


def _block_step(options: Options, levels: Sequence[Level], i: int, order: int) -> tuple[float, list[float], float]:
    """Return the factor of the block's first sample, the weights of outputs, newest first, and the noise."""
    base = i - order + 1
    step = Expansion.of(options["algorithm_type"], levels[base], levels[i + 1])
    if order == 1:
        return step.scale, [step.zeroth], step.noise
    heun = options["solver_type"] == "heun"
    ratios = [(levels[k].half_log_snr - levels[base].half_log_snr) / step.length for k in range(base + 1, i + 1)]
    newest = ratios[-1]
    if order == 2 or not heun:
        slope = (step.middle if order == 2 and not heun else step.first) / newest
        return step.scale, [slope, *[0.0] * (order - 2), step.zeroth - slope], step.noise
    inner, outer = ratios
    of_inner = (step.first * outer - 2 * step.second) / (outer - inner) / inner
    of_outer = (2 * step.second - step.first * inner) / (outer - inner) / outer
    return step.scale, [of_outer, of_inner, step.zeroth - of_inner - of_outer], step.noise


def _orders(options: Options, steps: int) -> list[int]:
    """Return the order of every row: blocks of 1, 2, … and a remainder; PyTorch's class lowers the last as needed."""
    order, zero = options["solver_order"], options["final_sigmas_type"] == "zero"
    block = list(range(1, order + 1))
    if options["lower_order_final"] or zero or steps % order:
        whole, rest = divmod(steps, order)
        # Without a remainder the last block is cut into smaller ones.
        orders = block * whole + block[:rest] if rest else block * (whole - 1) + [*block[:-1], 1]
    else:
        orders = block * (steps // order)
    return [*orders[:-1], 1] if zero else orders


def dpmsolver_sde(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of DPM++ SDE (arXiv 2211.01095 with noise; k-diffusion's `sample_dpmpp_sde`, r = 1/2).

    A step asks the model in the middle, in the logarithm, on a sample with noise, and restarts. Both stages see one
    Brownian path: the noise of the whole step holds the noise of its first half, so the first row keeps, ready for the
    second, what that needs of the sample and of the first half's noise. Without torchsde the path is the job's own.
    """
    path = sigma_path(options, steps)
    kind = options["prediction_type"]
    rows = []
    for t, sigma, end in path.steps_from(begin):
        here = denoised(kind, sigma)
        if end == 0:
            rows.append(make_row(t, here, c_in=c_in(sigma)))
            continue
        middle = math.sqrt(sigma * end)
        half_down, half_up = ancestral(sigma, middle)
        down, up = ancestral(sigma, end)
        share = math.sqrt((sigma - middle) / (sigma - end))
        half = half_down / sigma * X + (1 - half_down / sigma) * here + half_up * Z
        rows.append(make_row(t, half, keep=down / sigma * X + up * share * Z, c_in=c_in(sigma)))
        result = H1 + (1 - down / sigma) * denoised(kind, middle) + up * math.sqrt(1 - share**2) * Z
        rows.append(make_row(float(path.schedule.timestep(np.array(middle))), result, c_in=c_in(middle)))
    return Steps(rows, two_stage_levels(path, begin), path.init_noise_sigma)
