"""The cases that samplers are compared in with PyTorch's schedulers, and the model that both sides ask.

`tools/oracle/samplers.py` runs the cases with torch and diffusers and writes what comes out; the tests run them with
our tables. So nothing here needs torch or JAX, and both sides draw the same numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHAPE = (1, 4, 2, 2)
STEPS = (1, 4, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}


@dataclass(frozen=True)
class Group:
    """Cases of one scheduler class: all combinations of what is listed.

    Attributes:
        scheduler: the class that samples.
        options: changes to the config.
        source: a class whose config the scheduler is made from, as when a pipeline's scheduler is exchanged.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    predictions: Sequence[str | None] = PREDICTIONS
    spacings: Sequence[str | None] = (None,)
    steps: Sequence[int] = STEPS
    eta: float = 0.0
    noise: Mapping[str, Any] = field(default_factory=lambda: NOISE)
    source: str | None = None
    strengths: Sequence[float | None] = (None,)


@dataclass(frozen=True)
class Case:
    """One run of a sampler.

    Attributes:
        config: the scheduler config, with the class that wrote it.
        scheduler: the class that samples.
        strength: of a path that starts at `picture()` with noise, and keeps what `kept()` says; None for noise alone.
    """

    config: Mapping[str, Any]
    scheduler: str
    steps: int
    eta: float
    strength: float | None = None

    @property
    def begin(self) -> int:
        """How many steps are left out at the start, by the rule of diffusers' pipelines."""
        return 0 if self.strength is None else max(self.steps - min(int(self.steps * self.strength), self.steps), 0)

    def __str__(self) -> str:
        changed = {key: value for key, value in self.config.items() if key not in NOISE or NOISE[key] != value}
        return f"{self.scheduler} {changed} steps={self.steps} eta={self.eta} strength={self.strength}"


def cases() -> Iterator[Case]:
    """Return every case, in the order of the golden file."""
    for group in _groups():
        for prediction, spacing, steps, strength in itertools.product(
            group.predictions, group.spacings, group.steps, group.strengths
        ):
            config = {"_class_name": group.source or group.scheduler, **group.noise}
            if prediction is not None:
                config["prediction_type"] = prediction
            if spacing is not None:
                config["timestep_spacing"] = spacing
            yield Case({**config, **group.options}, group.scheduler, steps, group.eta, strength)


def initial_noise() -> np.ndarray:
    """Return the unit noise that every case starts from, `SHAPE` float32."""
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def picture() -> np.ndarray:
    """Return the clean sample of paths that start at one, `SHAPE` float32."""
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def kept() -> np.ndarray:
    """Return which numbers of a sample are the picture's after every row, `SHAPE` bool."""
    return np.random.default_rng(2).random(SHAPE) < 0.4


@functools.cache
def noise_of_row(row: int) -> np.ndarray:
    """Return the noise of a row, `SHAPE` float32."""
    return np.random.default_rng(1000 + row).standard_normal(SHAPE).astype(np.float32)


def model(x: np.ndarray, t: float) -> np.ndarray:
    """Return what stands for the model's output: cheap, smooth, and not linear in the sample."""
    return np.tanh(x * np.float32(0.3 + t / 1500) + np.float32(0.1) * np.sin(np.float32(7) * x)).astype(np.float32)


_KARRAS, _EXPONENTIAL, _BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
_RANGE = {"sigma_min": 0.1, "sigma_max": 10.0}
_RESPACED: tuple[dict[str, Any], ...] = (_KARRAS, _EXPONENTIAL, _BETA, {**_KARRAS, **_RANGE}, {**_BETA, **_RANGE})
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_DPM = "DPMSolverMultistepScheduler"
_SINGLE = "DPMSolverSinglestepScheduler"
_UNIPC = "UniPCMultistepScheduler"
_NO_SAMPLE = PREDICTIONS[:2]

_OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "PNDMScheduler": ({"set_alpha_to_one": True}, {"steps_offset": 0}),
    "DDIMScheduler": ({"set_alpha_to_one": False}, {"beta_schedule": "squaredcos_cap_v2"}, _ZERO_SNR),
    "DDPMScheduler": (
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        {"beta_schedule": "sigmoid"},
        _ZERO_SNR,
    ),
    "EulerDiscreteScheduler": (
        *_RESPACED,
        _ZERO_SNR,
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", **_KARRAS},
        {"final_sigmas_type": "sigma_min"},
        {"timestep_type": "continuous"},
        {"timestep_type": "continuous", "interpolation_type": "log_linear"},
    ),
    "EulerAncestralDiscreteScheduler": (_ZERO_SNR, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    "HeunDiscreteScheduler": _RESPACED,
    "LMSDiscreteScheduler": _RESPACED,
    "KDPM2DiscreteScheduler": _RESPACED,
    "KDPM2AncestralDiscreteScheduler": _RESPACED,
    "DPMSolverSDEScheduler": _RESPACED,
    _DPM: (
        *_RESPACED,
        {"use_lu_lambdas": True},
        _ZERO_SNR,
        *({"solver_order": order, "solver_type": kind} for order in (1, 2, 3) for kind in ("midpoint", "heun")),
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
        {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", **_KARRAS},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", **_KARRAS},
        *(
            {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min", "solver_type": kind}
            for algorithm in ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++")
            for kind in ("midpoint", "heun")
        ),
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", **_KARRAS},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    _SINGLE: (
        *_RESPACED,
        *({"solver_order": order, "solver_type": kind} for order in (1, 2, 3) for kind in ("midpoint", "heun")),
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {"final_sigmas_type": "sigma_min"},
        {"lower_order_final": True, "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3, "solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    ),
    _UNIPC: (
        *_RESPACED,
        _ZERO_SNR,
        *({"solver_order": order, "solver_type": kind} for order in (1, 2, 3) for kind in ("bh1", "bh2")),
        *(
            {"solver_order": order, "predict_x0": False, "final_sigmas_type": "sigma_min", "solver_type": kind}
            for order in (2, 3)
            for kind in ("bh1", "bh2")
        ),
        {"disable_corrector": [0, 1, 2]},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3},
    ),
    "DEISMultistepScheduler": (
        *_RESPACED,
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False},
    ),
    "LCMScheduler": ({"timestep_scaling": 1.0}, {"original_inference_steps": 100}),
    "TCDScheduler": ({"original_inference_steps": 100},),
}
_EDM_OPTIONS = ({}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}, {"sigma_data": 1.0})


def _groups() -> Iterator[Group]:
    for scheduler, options in _OPTIONS.items():
        spacings: Sequence[str | None] = (None,) if scheduler in (_SINGLE, "LCMScheduler", "TCDScheduler") else SPACINGS
        yield Group(scheduler, {"skip_prk_steps": True}, spacings=spacings)
        for changes in options:
            yield Group(scheduler, {"skip_prk_steps": True, **changes})
    for order in (2, 3):  # whole blocks, and remainders of each size
        changes = {"solver_order": order, "solver_type": "heun", "final_sigmas_type": "sigma_min"}
        for last in (True, False):
            yield Group(_SINGLE, {**changes, "lower_order_final": last}, ("epsilon",), steps=(2, 3, 5, 6, 7))
    for scheduler in ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", _DPM, _UNIPC):
        spaced = {"skip_prk_steps": True}
        yield Group(scheduler, spaced, ("v_prediction",), SPACINGS, (2, 3, 7, 30))
    yield Group("DDIMScheduler", eta=0.7, spacings=("leading", "trailing"))
    yield Group("TCDScheduler", eta=0.3)
    for changes in _EDM_OPTIONS:
        yield Group("EDMEulerScheduler", changes, predictions=_NO_SAMPLE, noise={})
        yield Group("EDMDPMSolverMultistepScheduler", changes, predictions=_NO_SAMPLE, noise={})
    for changes in ({"solver_order": 3}, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"}):
        yield Group("EDMDPMSolverMultistepScheduler", changes, predictions=_NO_SAMPLE, noise={})
    for changes in ({}, {"shift": 3.0}, {"shift": 3.0, "stochastic_sampling": True}, *_RESPACED):
        yield Group("FlowMatchEulerDiscreteScheduler", changes, predictions=(None,), noise={})
    yield from _exchanged()
    yield from _from_pictures()


def _from_pictures() -> Iterator[Group]:
    """Yield cases of paths that start at a picture, at the start, in the middle and at the end of the schedule."""
    strengths = (0.1, 0.3, 0.55, 0.8, 1.0)
    for scheduler in _OPTIONS:
        yield Group(scheduler, {"skip_prk_steps": True}, _NO_SAMPLE, steps=(10, 20), strengths=strengths)
    for options in ({"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}, _KARRAS):
        yield Group(_DPM, options, ("epsilon",), steps=(10, 20), strengths=strengths)
    for options in ({"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}):
        yield Group(_SINGLE, options, ("epsilon",), steps=(10, 11, 20), strengths=strengths)
    yield Group(_UNIPC, {"solver_order": 3}, ("epsilon",), steps=(10, 20), strengths=strengths)
    yield Group("DEISMultistepScheduler", {"solver_order": 3}, ("epsilon",), steps=(10, 20), strengths=strengths)
    yield Group("EulerDiscreteScheduler", _KARRAS, ("epsilon",), SPACINGS, (10, 20), strengths=strengths)
    yield Group("DDIMScheduler", eta=0.7, predictions=("epsilon",), steps=(10,), strengths=strengths)


def _exchanged() -> Iterator[Group]:
    """Yield cases of a pipeline whose scheduler is exchanged: each class made from configs that people have."""
    for scheduler in _OPTIONS:
        for source, changes in (
            ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True}),
            ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "interpolation_type": "linear"}),
            ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_type": "heun", **_KARRAS}),
        ):
            yield Group(scheduler, {"skip_prk_steps": True, **changes}, ("epsilon",), steps=(4, 20), source=source)
