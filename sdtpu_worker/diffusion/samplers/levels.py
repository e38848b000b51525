"""The noise levels that solvers in `lambda = log(alpha / sigma)` visit: DPM-Solver, DEIS and UniPC."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdtpu_worker.diffusion.samplers.noise import Options, SigmaSchedule, signal_and_noise, spaced_with_end


@dataclass(frozen=True)
class Level:
    """One noise level: `x = alpha * x0 + sigma * noise`."""

    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """`lambda`; infinite without noise."""
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma > 0 else math.inf


@dataclass(frozen=True)
class LevelPath:
    """What a solver visits.

    Attributes:
        timesteps: `(n,)`, what the model is told.
        levels: `n + 1` levels, the last one is where the path ends.
    """

    timesteps: np.ndarray
    levels: list[Level]

    def levels_from(self, begin: int) -> list[tuple[float, float]]:
        """Return `(alpha, sigma)` where the steps from the number `begin` on start."""
        return [(level.alpha, level.sigma) for level in self.levels[begin : len(self.timesteps)]]


def level_path(
    options: Options, steps: int, end_of_respaced: Callable[[np.ndarray, float], float], total: int | None = None
) -> LevelPath:
    """Return the path of a solver.

    Args:
        end_of_respaced: the last sigma of a path whose sigmas were respaced, from the others and the schedule's
            smallest.
        total: how many of the timesteps to use; None for all.
    """
    schedule = SigmaSchedule(options)
    smallest = float(schedule.sigmas[0])
    timesteps = spaced_with_end(options, steps, total or options["num_train_timesteps"])
    respaced = schedule.respaced(float(schedule.sigmas[-1]), smallest, steps)
    if respaced is None:
        sigmas = schedule.at(timesteps)
        end = 0.0 if options.get("final_sigmas_type", "sigma_min") == "zero" else smallest
    else:
        sigmas, timesteps = respaced, schedule.timestep(respaced)
        if _rounds(options):
            timesteps = timesteps.round()
        end = end_of_respaced(sigmas, smallest)
    sigmas = np.append(sigmas, end).astype(np.float32).astype(float)
    # PyTorch's classes cut what is left of fractions.
    return LevelPath(timesteps.astype(int), [Level(*signal_and_noise(sigma)) for sigma in sigmas])


def _rounds(options: Options) -> bool:
    """Return whether timesteps of respaced sigmas are rounded; multistep DPM-Solver cuts those of a cosine schedule."""
    cosine = options["beta_schedule"] == "squaredcos_cap_v2"
    if cosine and options["_class_name"] == "DPMSolverMultistepScheduler":
        return False
    return options["use_karras_sigmas"] or options.get("use_lu_lambdas", False)
