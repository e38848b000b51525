"""What each scheduler class of diffusers reads from its config, and what of it is served. Anything else is refused.

`OPTIONS` has one table per class: a key's default in PyTorch's class, the values that are served, and why others are
not. A key that the class does not read but another class does is irrelevant, as it is in PyTorch; a key that no class
reads is an error, so that nothing is ignored in silence. `read.py` applies the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_TRAIN_TIMESTEPS = 1_000_000


@dataclass(frozen=True)
class Option:
    """One key of a scheduler class.

    Attributes:
        default: what PyTorch's class takes for a key that is missing.
        serves: whether a value is served.
        allowed: the served values, in words.
        reason: why other values are not served; empty where PyTorch takes no others.
        means: values that PyTorch's class takes for another, and that other.
    """

    default: Any
    serves: Callable[[Any], bool]
    allowed: str
    reason: str = ""
    means: Mapping[str, str] = field(default_factory=dict)

    def but(self, **changes: Any) -> Option:
        """Return the option with other attributes."""
        return dataclasses.replace(self, **changes)


def choice(default: Any, *values: Any, reason: str = "", means: Mapping[str, str] | None = None) -> Option:
    """Return an option that serves some values; a Boolean is never taken for a number."""
    served = [(type(value), value) for value in values]
    words = ["null" if value is None else str(value).lower() for value in values]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return Option(default, lambda value: (type(value), value) in served, text, reason, means or {})


def flag(default: bool) -> Option:
    """Return an option that is true or false."""
    return choice(default, True, False)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 or value in (math.inf, -math.inf)


def number(default: float | None, low: float, high: float, optional: bool = False) -> Option:
    """Return an option that is a number from `low` to `high`."""

    def serves(value: Any) -> bool:
        return (optional and value is None) or (is_number(value) and low <= value <= high)

    text = f"a number up to {high:g}" if low == -math.inf else f"a number from {low:g} to {high:g}"
    return Option(default, serves, text + (", or null" if optional else ""))


def integer(default: int, low: int, high: int, reason: str = "") -> Option:
    """Return an option that is an integer from `low` to `high`."""

    def serves(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Option(default, serves, f"an integer from {low:,} to {high:,}", reason)


def _serves_betas(value: Any) -> bool:
    if value is None:
        return True
    sized = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_TRAIN_TIMESTEPS
    return sized and all(is_number(beta) and 0 <= beta < 1 for beta in value)


def _serves_step_indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


NOT_LINEAR = "it clips what the model predicts, which no row of coefficients can say; set it to false"
FOR_FLOW = "it makes a flow-matching schedule of a noise schedule; set it to false"
ONE_OUTPUT = "models that predict their variance are not served"

NO_CLIPPING = choice(False, False, reason=NOT_LINEAR)
TIMESTEPS = {"num_train_timesteps": integer(1000, 2, MAX_TRAIN_TIMESTEPS)}
BETAS = {
    **TIMESTEPS,
    "beta_start": number(0.0001, 0, 1),
    "beta_end": number(0.02, 0, 1),
    "beta_schedule": choice("linear", "linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": Option(None, _serves_betas, "null, or a list of numbers from 0 to below 1"),
}
STABLE_DIFFUSION_BETAS = {
    **BETAS,
    "beta_start": number(0.00085, 0, 1),
    "beta_end": number(0.012, 0, 1),
}
SPACING = {
    "timestep_spacing": choice("linspace", "linspace", "leading", "trailing"),
    "steps_offset": integer(0, 0, MAX_TRAIN_TIMESTEPS),
}
LEADING = {**SPACING, "timestep_spacing": choice("leading", "linspace", "leading", "trailing")}
PREDICTION = {"prediction_type": choice("epsilon", "epsilon", "v_prediction", "sample")}
NO_SAMPLE_PREDICTION = {
    "prediction_type": choice(
        "epsilon", "epsilon", "v_prediction", reason="PyTorch's class cannot run with `sample` either"
    )
}
NO_FLOW_PREDICTION = {
    "prediction_type": choice(
        "epsilon",
        "epsilon",
        "v_prediction",
        "sample",
        reason="`flow_prediction` needs FlowMatchEulerDiscreteScheduler here",
    )
}
SIGMAS = {
    "use_karras_sigmas": flag(False),
    "use_exponential_sigmas": flag(False),
    "use_beta_sigmas": flag(False),
    "sigma_min": number(None, 1e-9, 1e9, optional=True),
    "sigma_max": number(None, 1e-9, 1e9, optional=True),
}
ZERO_SNR = {"rescale_betas_zero_snr": flag(False)}
CLIPPING = {"clip_sample": NO_CLIPPING.but(default=True), "thresholding": NO_CLIPPING}
FINAL_SIGMAS = {"final_sigmas_type": choice("zero", "zero", "sigma_min")}
NO_FLOW = {
    "use_flow_sigmas": choice(False, False, reason=FOR_FLOW),
    "use_dynamic_shifting": choice(False, False, reason=FOR_FLOW),
    "thresholding": NO_CLIPPING,
}
VARIANCE = {
    "variance_type": choice(
        None, None, "fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log", reason=ONE_OUTPUT
    ),
    "lambda_min_clipped": number(-math.inf, -math.inf, 0),
}
SOLVER = {
    "solver_order": integer(2, 1, 3, reason="PyTorch knows no higher order"),
    "solver_type": choice(
        "midpoint",
        "midpoint",
        "heun",
        means={"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    ),
    "lower_order_final": flag(True),
}
EDM = {
    **TIMESTEPS,
    **NO_SAMPLE_PREDICTION,
    **FINAL_SIGMAS,
    "sigma_min": number(0.002, 1e-9, 1e9),
    "sigma_max": number(80.0, 1e-9, 1e9),
    "sigma_data": number(0.5, 1e-9, 1e9),
    "sigma_schedule": choice("karras", "karras", "exponential"),
    "rho": number(7.0, 1e-3, 1e3),
}
CONSISTENCY = {
    **STABLE_DIFFUSION_BETAS,
    "beta_schedule": BETAS["beta_schedule"].but(default="scaled_linear"),
    **PREDICTION,
    **ZERO_SNR,
    **CLIPPING,
    "clip_sample": NO_CLIPPING,
    "original_inference_steps": integer(50, 1, MAX_TRAIN_TIMESTEPS),
}
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "PNDMScheduler": {
        **BETAS,
        **LEADING,
        **NO_SAMPLE_PREDICTION,
        "set_alpha_to_one": flag(False),
        "skip_prk_steps": choice(
            False,
            True,
            reason="the Runge-Kutta start (PRK) is for pixel-space models and not served; set skip_prk_steps to true,"
            " as Stable Diffusion does",
        ),
    },
    "DDIMScheduler": {
        **BETAS,
        **LEADING,
        **PREDICTION,
        **ZERO_SNR,
        **CLIPPING,
        "set_alpha_to_one": flag(True),
    },
    "DDPMScheduler": {
        **BETAS,
        "beta_schedule": choice(
            "linear",
            "linear",
            "scaled_linear",
            "squaredcos_cap_v2",
            "sigmoid",
            reason="no latent diffusion model is known to use `laplace`",
        ),
        **LEADING,
        **PREDICTION,
        **ZERO_SNR,
        **CLIPPING,
        "variance_type": choice(
            "fixed_small",
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            reason=f"{ONE_OUTPUT}, and `fixed_large_log` is not a number in PyTorch",
        ),
    },
    "EulerDiscreteScheduler": {
        **BETAS,
        **SPACING,
        "prediction_type": choice("epsilon", "epsilon", "v_prediction", "sample", means={"original_sample": "sample"}),
        **SIGMAS,
        **ZERO_SNR,
        **FINAL_SIGMAS,
        "interpolation_type": choice("linear", "linear", "log_linear"),
        "timestep_type": choice("discrete", "discrete", "continuous"),
    },
    "EulerAncestralDiscreteScheduler": {**BETAS, **SPACING, **NO_SAMPLE_PREDICTION, **ZERO_SNR},
    "HeunDiscreteScheduler": {
        **STABLE_DIFFUSION_BETAS,
        **SPACING,
        **PREDICTION,
        **SIGMAS,
        "clip_sample": NO_CLIPPING,
    },
    "LMSDiscreteScheduler": {**BETAS, **SPACING, **PREDICTION, **SIGMAS},
    "KDPM2DiscreteScheduler": {**STABLE_DIFFUSION_BETAS, **SPACING, **NO_SAMPLE_PREDICTION, **SIGMAS},
    "KDPM2AncestralDiscreteScheduler": {**STABLE_DIFFUSION_BETAS, **SPACING, **NO_SAMPLE_PREDICTION, **SIGMAS},
    "DPMSolverSDEScheduler": {
        **STABLE_DIFFUSION_BETAS,
        **SPACING,
        **NO_SAMPLE_PREDICTION,
        **SIGMAS,
        "noise_sampler_seed": choice(None, None, reason="the noise is the job's own, from its seed"),
    },
    "DPMSolverMultistepScheduler": {
        **BETAS,
        **SPACING,
        **NO_FLOW_PREDICTION,
        **SIGMAS,
        **ZERO_SNR,
        **FINAL_SIGMAS,
        **NO_FLOW,
        **VARIANCE,
        **SOLVER,
        "algorithm_type": choice("dpmsolver++", *ALGORITHMS, means={"deis": "dpmsolver++"}),
        "euler_at_final": flag(False),
        "use_lu_lambdas": flag(False),
    },
    "DPMSolverSinglestepScheduler": {
        **BETAS,
        **NO_FLOW_PREDICTION,
        **SIGMAS,
        **FINAL_SIGMAS,
        **NO_FLOW,
        **VARIANCE,
        **SOLVER,
        "lower_order_final": flag(False),
        "algorithm_type": choice("dpmsolver++", *ALGORITHMS[:3], means={"deis": "dpmsolver++"}),
    },
    "UniPCMultistepScheduler": {
        **BETAS,
        **SPACING,
        **NO_FLOW_PREDICTION,
        **SIGMAS,
        **ZERO_SNR,
        **FINAL_SIGMAS,
        **NO_FLOW,
        "solver_order": integer(2, 1, 3, reason="higher orders need a longer history"),
        "solver_type": choice("bh2", "bh1", "bh2", means={"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}),
        "lower_order_final": flag(True),
        "predict_x0": flag(True),
        "disable_corrector": Option((), _serves_step_indices, "a list of steps"),
        "solver_p": choice(None, None, reason="a predictor of another class is not served"),
        "shift_terminal": choice(None, None, reason=FOR_FLOW),
    },
    "DEISMultistepScheduler": {
        **BETAS,
        **SPACING,
        **NO_FLOW_PREDICTION,
        **SIGMAS,
        **NO_FLOW,
        "solver_order": integer(2, 1, 3, reason="PyTorch knows no higher order"),
        "solver_type": choice(
            "logrho",
            "logrho",
            means=dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
        ),
        "lower_order_final": flag(True),
        "algorithm_type": choice("deis", "deis", means={"dpmsolver": "deis", "dpmsolver++": "deis"}),
    },
    "LCMScheduler": {**CONSISTENCY, "timestep_scaling": number(10.0, 0, 1e9)},
    "TCDScheduler": CONSISTENCY,
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": {
        **EDM,
        **SOLVER,
        "thresholding": NO_CLIPPING,
        "algorithm_type": choice("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", means={"deis": "dpmsolver++"}),
        "euler_at_final": flag(False),
    },
    "FlowMatchEulerDiscreteScheduler": {
        **TIMESTEPS,
        "shift": number(1.0, 1e-6, 1e6),
        "use_dynamic_shifting": choice(
            False, False, reason="a shift that depends on the picture's size is not served yet; set a constant shift"
        ),
        "invert_sigmas": choice(False, False, reason="no text-to-image model is known to use it"),
        "shift_terminal": choice(None, None, reason="no text-to-image model is known to use it"),
        "stochastic_sampling": flag(False),
        **SIGMAS,
    },
}

# Keys that say nothing about sampling, or only together with an option that is refused.
WITHOUT_EFFECT = {
    "_class_name": "names the class",
    "_diffusers_version": "the version that wrote the file",
    "_use_default_values": "which keys had their defaults when the file was written",
    "_name_or_path": "where the file came from",
    "base_image_seq_len": "only read with use_dynamic_shifting",
    "base_shift": "only read with use_dynamic_shifting",
    "clip_sample_range": "only read with clip_sample",
    "dynamic_thresholding_ratio": "only read with thresholding",
    "flow_shift": "only read with use_flow_sigmas",
    "max_image_seq_len": "only read with use_dynamic_shifting",
    "max_shift": "only read with use_dynamic_shifting",
    "sample_max_value": "only read with thresholding",
    "tensor_format": "a key of diffusers before 0.7",
    "time_shift_type": "only read with use_dynamic_shifting",
}
