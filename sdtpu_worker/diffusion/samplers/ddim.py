"""Samplers that step between timesteps of the schedule: DDIM, DDPM and PNDM."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdtpu_worker.diffusion.samplers.noise import (
    Options,
    predicted_noise,
    predicted_original,
    signal_levels,
    spaced_integers,
)
from sdtpu_worker.diffusion.samplers.table import H1, HISTORY, Form, M, Row, Steps, X, Z, make_row

# Adams-Bashforth weights for the newest model output first (PNDM paper, arXiv 2202.09778, equation 12).
_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class _Levels:
    """The signal at the timesteps that a sampler visits, `final` before the first one."""

    def __init__(self, options: Options, steps: int, alpha_one_at_end: bool) -> None:
        self._signal = signal_levels(options).astype(float)
        self._final = 1.0 if alpha_one_at_end else float(self._signal[0])
        self._last = len(self._signal) - 1
        self.timesteps = [min(int(t), self._last) for t in spaced_integers(options, steps)]
        self.ratio = options["num_train_timesteps"] // steps

    def at(self, timestep: int) -> tuple[float, float]:
        """Return `(signal, alpha)`."""
        signal = float(self._signal[min(timestep, self._last)]) if timestep >= 0 else self._final
        return signal, math.sqrt(signal)

    def of_samples(self, timesteps: Sequence[int]) -> list[tuple[float, float]]:
        """Return `(alpha, sigma)` of the samples at timesteps."""
        return [(self.at(t)[1], math.sqrt(1 - self.at(t)[0])) for t in timesteps]


def ddim(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return DDIM's rows (arXiv 2010.02502, equations 12 and 16)."""
    levels, kind = _Levels(options, steps, options["set_alpha_to_one"]), options["prediction_type"]
    rows = []
    timesteps = levels.timesteps[begin:]
    for t in timesteps:
        now, alpha = levels.at(t)
        then, next_alpha = levels.at(t - levels.ratio)
        sigma = math.sqrt(1 - now)
        up = eta * math.sqrt(max((1 - then) / (1 - now) * (1 - now / then), 0.0)) if then else 0.0
        original, noise = predicted_original(kind, alpha, sigma), predicted_noise(kind, alpha, sigma)
        rows.append(make_row(t, next_alpha * original + math.sqrt(max(1 - then - up**2, 0.0)) * noise + up * Z))
    return Steps(rows, levels.of_samples(timesteps))


def ddpm(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return DDPM's rows (arXiv 2006.11239, equations 6 and 7)."""
    levels, kind = _Levels(options, steps, True), options["prediction_type"]
    timesteps = levels.timesteps[begin:]
    rows = []
    for t, end in zip(timesteps, [*timesteps[1:], -1], strict=True):
        now, alpha = levels.at(t)
        then, next_alpha = levels.at(end)
        kept, beta = now / then, 1 - now / then
        original = predicted_original(kind, alpha, math.sqrt(1 - now))
        mean = next_alpha * beta / (1 - now) * original + math.sqrt(kept) * (1 - then) / (1 - now) * X
        variance = beta if options["variance_type"] == "fixed_large" else max((1 - then) / (1 - now) * beta, 1e-20)
        rows.append(make_row(t, mean + (math.sqrt(variance) if t > 0 else 0.0) * Z))
    return Steps(rows, levels.of_samples(timesteps))


def pndm(options: Options, steps: int, eta: float, begin: int = 0) -> Steps:
    """Return the rows of PLMS, the linear multistep half of PNDM, as Stable Diffusion uses it (`skip_prk_steps`).

    The method asks the model twice at its second timestep, for the average of the first two outputs, so there is one
    row more than steps. Its restart from the first sample needs no saved sample: that sample is `(x - b0*h1) / a0` of
    the first row's a0 and b0. The history keeps the model's outputs, of whatever prediction type. A picture's path
    begins so too, wherever that is: PyTorch's class counts its own calls. (From the second visit of a timestep, `begin`
    1, it takes its second step from the timestep before, with the first sample.)
    """
    levels, kind = _Levels(options, steps, options["set_alpha_to_one"]), options["prediction_type"]
    visits = [levels.timesteps[0], levels.timesteps[1], *levels.timesteps[1:]] if steps > 1 else levels.timesteps
    visits = visits[begin:]
    rows: list[Row] = []
    first = (1.0, 0.0)
    for i, t in enumerate(visits):
        start, end = (t + levels.ratio, t) if i == 1 else (t, t - levels.ratio)
        a, b = _transfer(kind, levels.at(start)[0], levels.at(end)[0])
        if i == 1:
            saved = (X - first[1] * H1) / first[0]
            rows.append(make_row(t, a * saved + b * (M + H1) / 2))
            continue
        first = (a, b) if i == 0 else first
        weights = _ADAMS_BASHFORTH[min(max(i - 1, 0), 3)]
        outputs: Form = sum(w * output for w, output in zip(weights, (M, *HISTORY), strict=False))  # type: ignore[assignment]  # of at least one
        rows.append(make_row(t, a * X + b * outputs, keep=M))
    return Steps(rows, levels.of_samples(visits))


def _transfer(prediction_type: str, now: float, then: float) -> tuple[float, float]:
    """Return `(a, b)` of the deterministic step `x' = a*x + b*m` between two signal levels."""
    alpha, sigma, next_alpha, next_sigma = (math.sqrt(v) for v in (now, 1 - now, then, 1 - then))
    original = predicted_original(prediction_type, alpha, sigma)
    noise = predicted_noise(prediction_type, alpha, sigma)
    result = next_alpha * original + next_sigma * noise
    return float(result[0]), float(result[1])
