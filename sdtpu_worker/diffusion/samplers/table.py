"""Every sampler as a table of coefficients, one row per denoising step.

With `m` the guided model output at `(c_in * x, t)`, every sampler here takes one step as

    h  = p*x + q*m                                   what the method keeps in its history
    x' = a*x + b*h + c*h1 + d*h2 + e*h3
    if push: (h1, h2, h3) = (h, h1, h2)

so that samplers, step counts and prediction types are data to one compiled program. A new sampler is one function
from a `NoiseSchedule` and a number of steps to rows, and one line in `SAMPLERS`. Tables are made on the host in
float64 and stored in float32; they agree with diffusers' Flax schedulers to float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtpu_worker.contract.request import MAX_STEPS, SAMPLER_NAMES
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from sdtpu_worker.redaction import brief

COLUMNS = ("t", "c_in", "p", "q", "a", "b", "c", "d", "e", "push")
_MAX_TRAIN_TIMESTEPS = 1_000_000
PREDICTION_TYPES = ("epsilon", "v_prediction")
# Adams-Bashforth weights for the newest model output first (PNDM paper, arXiv 2202.09778, equation 12).
_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class NoiseSchedule:
    """What a checkpoint's `scheduler_config.json` says about noise.

    Attributes:
        alphas_cumprod: `(num_train_timesteps,) float64`, the share of signal variance left at each timestep.
        config: the whole scheduler config; a sampler takes diffusers' default for a key that is missing.
    """

    alphas_cumprod: np.ndarray
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Build the schedule from a diffusers scheduler config.

        Raises:
            InvalidCheckpoint: the config names a beta schedule, a prediction type or a number of timesteps that there
                is not.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= _MAX_TRAIN_TIMESTEPS:
            raise InvalidCheckpoint(
                f"num_train_timesteps in the scheduler config must be 1 to {_MAX_TRAIN_TIMESTEPS:,}, got {brief(steps)}"
            )
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], np.float64)
        elif kind == "linear":
            betas = np.linspace(start, end, steps)
        elif kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps) ** 2
        elif kind == "squaredcos_cap_v2":
            edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        else:
            raise InvalidCheckpoint(
                f"beta_schedule in the scheduler config must be one of linear, scaled_linear, squaredcos_cap_v2,"
                f" got {kind!r}"
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise InvalidCheckpoint(
                f"prediction_type in the scheduler config must be one of {', '.join(PREDICTION_TYPES)},"
                f" got {prediction_type!r}"
            )
        return cls(np.cumprod(1 - betas), config)

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`."""
        return self.config.get("prediction_type", "epsilon")

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the model was trained on."""
        return len(self.alphas_cumprod)

    def leading_timesteps(self, steps: int) -> tuple[np.ndarray, int]:
        """Return `steps` evenly spaced timesteps, last first, and their distance ("leading" spacing)."""
        ratio = self.num_train_timesteps // steps
        return np.arange(steps)[::-1] * ratio + int(self.config.get("steps_offset", 0)), ratio

    def signal(self, timestep: float) -> float:
        """Return `alphas_cumprod` at a timestep, which is clamped into the table."""
        return float(self.alphas_cumprod[int(np.clip(timestep, 0, self.num_train_timesteps - 1))])


@dataclass(frozen=True)
class CoefficientTable:
    """One sampler at one number of steps.

    Attributes:
        rows: `(MAX_STEPS, len(COLUMNS)) float32`; rows from `num_inference_steps` on are zero and never read.
        num_inference_steps: how many rows count.
        init_noise_sigma: what the initial unit noise is multiplied by.
    """

    rows: np.ndarray
    num_inference_steps: int
    init_noise_sigma: float


def make_table(sampler: str, schedule: NoiseSchedule, num_inference_steps: int) -> CoefficientTable:
    """Return the coefficients of a sampler.

    Raises:
        InvalidRequest: the sampler is not known, or the checkpoint was trained on fewer timesteps than asked for.
    """
    if sampler not in SAMPLERS:
        raise InvalidRequest(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    most = min(schedule.num_train_timesteps, MAX_STEPS)
    if not 1 <= num_inference_steps <= most:
        raise InvalidRequest(
            f"num_inference_steps must be 1 to {most} (what this checkpoint was trained on), got {num_inference_steps}"
        )
    rows, init_noise_sigma = SAMPLERS[sampler](schedule, num_inference_steps)
    table = np.zeros((MAX_STEPS, len(COLUMNS)), np.float32)
    for i, row in enumerate(rows):
        table[i] = [row.get(column, 1.0 if column in ("c_in", "q", "push") else 0.0) for column in COLUMNS]
    table[: len(rows), 0] = np.clip(table[: len(rows), 0], 0, schedule.num_train_timesteps - 1)
    return CoefficientTable(table, len(rows), init_noise_sigma)


Rows = list[dict[str, float]]


def ddim(schedule: NoiseSchedule, steps: int) -> tuple[Rows, float]:
    """DDIM with eta 0 (arXiv 2010.02502, equation 12); `clip_sample` is for pixel-space models and not applied."""
    timesteps, ratio = schedule.leading_timesteps(steps)
    final = 1.0 if schedule.config.get("set_alpha_to_one", True) else schedule.signal(0)
    rows = []
    for t in timesteps:
        now, then = schedule.signal(t), schedule.signal(t - ratio) if t >= ratio else final
        a, b = _transfer(schedule, now, then)
        rows.append({"t": t, "a": a, "b": b})
    return rows, 1.0


def pndm(schedule: NoiseSchedule, steps: int) -> tuple[Rows, float]:
    """PLMS, the linear multi-step half of PNDM, as Stable Diffusion uses it (`skip_prk_steps`).

    The method asks the model twice at its second timestep, for the average of the first two outputs. Its restart
    from the first sample needs no saved sample: that sample is `(x - b0*h1) / a0` of the first step's a0 and b0.
    Like diffusers' Flax pipeline this runs the first `steps` of the `steps + 1` rows.
    """
    timesteps, ratio = schedule.leading_timesteps(steps)
    visits = [timesteps[0], timesteps[1], *timesteps[1:]] if steps > 1 else list(timesteps)
    rows: Rows = []
    for i, t in enumerate(visits[:steps]):
        start, end = (t + ratio, t) if i == 1 else (t, max(t - ratio, 0))
        a, b = _transfer(schedule, schedule.signal(start), schedule.signal(end))
        if i == 1:
            a0, b0 = rows[0]["a"], rows[0]["b"]
            rows.append({"t": t, "a": a / a0, "b": b / 2, "c": b / 2 - a * b0 / a0, "push": 0.0})
            continue
        weights = _ADAMS_BASHFORTH[min(max(i - 1, 0), 3)]
        rows.append({"t": t, "a": a, **{name: b * weight for name, weight in zip("bcde", weights, strict=False)}})
    return rows, 1.0


def euler(schedule: NoiseSchedule, steps: int) -> tuple[Rows, float]:
    """Euler's method in sigma (arXiv 2206.00364, algorithm 2 without churn); timesteps may be fractional."""
    last = schedule.num_train_timesteps - 1
    leading = schedule.config.get("timestep_spacing", "linspace") == "leading"
    if leading:
        timesteps = np.arange(steps)[::-1] * (schedule.num_train_timesteps // steps) + 1.0
    else:
        timesteps = np.linspace(last, 0, steps)
    all_sigmas = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    sigmas = np.append(np.interp(timesteps, np.arange(last + 1), all_sigmas), 0.0)
    rows = []
    for t, sigma, next_sigma in zip(timesteps, sigmas, sigmas[1:], strict=False):
        dt, norm = next_sigma - sigma, math.sqrt(sigma**2 + 1)
        if schedule.prediction_type == "epsilon":
            a, b = 1.0, dt
        else:
            a, b = 1 + dt * sigma / norm**2, dt / norm
        rows.append({"t": t, "c_in": 1 / norm, "a": a, "b": b})
    top = float(sigmas.max())
    return rows, math.sqrt(top**2 + 1) if leading else top


def dpmsolver_multistep(schedule: NoiseSchedule, steps: int) -> tuple[Rows, float]:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), with a first-order last step below 15 steps."""
    spacing = schedule.config.get("timestep_spacing", "linspace")
    total = schedule.num_train_timesteps
    if spacing == "leading":
        ratio = total // (steps + 1)
        timesteps = np.arange(1, steps + 1)[::-1] * ratio + int(schedule.config.get("steps_offset", 0))
    elif spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / steps))[:steps].astype(int) - 1
    else:
        timesteps = np.linspace(0, total - 1, steps + 1).round().astype(int)[::-1][:-1]
    lower_order_final = schedule.config.get("lower_order_final", True) and steps < 15
    heun = schedule.config.get("solver_type", "midpoint") == "heun"
    second_order = int(schedule.config.get("solver_order", 2)) > 1
    ends = [*timesteps[1:], 0]
    rows: Rows = []
    last_h = 0.0
    for i, (t, end) in enumerate(zip(timesteps, ends, strict=True)):
        alpha, sigma, half_log_snr = _signal_noise(schedule.signal(t))
        next_alpha, next_sigma, next_half_log_snr = _signal_noise(schedule.signal(end))
        h = next_half_log_snr - half_log_snr
        b, c = -next_alpha * math.expm1(-h), 0.0
        if second_order and i > 0 and not (lower_order_final and i == steps - 1) and min(h, last_h) > 0:
            slope = next_alpha * (math.expm1(-h) / h + 1) if heun else -0.5 * next_alpha * math.expm1(-h)
            b, c = b + slope * h / last_h, -slope * h / last_h
        to_x0 = {"p": alpha, "q": -sigma}
        if schedule.prediction_type == "epsilon":
            to_x0 = {"p": 1 / alpha, "q": -sigma / alpha}
        rows.append({"t": t, **to_x0, "a": next_sigma / sigma, "b": b, "c": c})
        last_h = h
    return rows, 1.0


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], tuple[Rows, float]]] = dict(
    zip(SAMPLER_NAMES, (pndm, ddim, euler, dpmsolver_multistep), strict=True)
)

# The diffusers class in a checkpoint's scheduler config, and the sampler that it stands for here.
SAMPLER_OF_CLASS = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}


def default_sampler(config: Mapping[str, Any]) -> str:
    """Return the sampler that a scheduler config asks for; PNDM, Stable Diffusion's own, for a class not known."""
    return SAMPLER_OF_CLASS.get(str(config.get("_class_name", "")).removeprefix("Flax"), "pndm")


def _transfer(schedule: NoiseSchedule, now: float, then: float) -> tuple[float, float]:
    """Return `(a, b)` of the deterministic step `x' = a*x + b*m` between two signal levels."""
    alpha, sigma, next_alpha, next_sigma = (math.sqrt(v) for v in (now, 1 - now, then, 1 - then))
    if schedule.prediction_type == "epsilon":
        return next_alpha / alpha, next_sigma - next_alpha * sigma / alpha
    return next_alpha * alpha + next_sigma * sigma, next_sigma * alpha - next_alpha * sigma


def _signal_noise(alphas_cumprod: float) -> tuple[float, float, float]:
    alpha, sigma = math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)
    return alpha, sigma, math.log(alpha) - math.log(sigma)
