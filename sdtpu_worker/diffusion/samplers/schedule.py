"""What a checkpoint's scheduler config says about sampling, and the tables that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.contract.samplers import DIFFUSERS_CLASSES, SIGMA_SPACINGS, resolve_sampler
from sdtpu_worker.diffusion.samplers import consistency, ddim, dpmsolver, euler, singlestep, unipc
from sdtpu_worker.diffusion.samplers.noise import signal_levels
from sdtpu_worker.diffusion.samplers.read import PARAMETERISATIONS, Options, read_as, read_own, sampler_of
from sdtpu_worker.diffusion.samplers.table import CoefficientTable, Steps, pack
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from sdtpu_worker.redaction import brief

METHODS: Mapping[str, Callable[[Options, int, float, int], Steps]] = {
    "PNDMScheduler": ddim.pndm,
    "DDIMScheduler": ddim.ddim,
    "DDPMScheduler": ddim.ddpm,
    "EulerDiscreteScheduler": euler.euler,
    "EulerAncestralDiscreteScheduler": euler.euler_ancestral,
    "HeunDiscreteScheduler": euler.heun,
    "LMSDiscreteScheduler": euler.lms,
    "KDPM2DiscreteScheduler": euler.dpm2,
    "KDPM2AncestralDiscreteScheduler": euler.dpm2_ancestral,
    "DPMSolverMultistepScheduler": dpmsolver.multistep,
    "DPMSolverSinglestepScheduler": singlestep.singlestep,
    "DPMSolverSDEScheduler": singlestep.dpmsolver_sde,
    "UniPCMultistepScheduler": unipc.unipc,
    "DEISMultistepScheduler": unipc.deis,
    "LCMScheduler": consistency.lcm,
    "TCDScheduler": consistency.tcd,
    "EDMEulerScheduler": euler.edm_euler,
    "EDMDPMSolverMultistepScheduler": dpmsolver.edm_multistep,
    "FlowMatchEulerDiscreteScheduler": euler.flow_match_euler,
}
"""The rows of each scheduler class, from its options, a number of steps, eta, and the first step that is taken."""

_CLASSES_WITH_ETA = ("DDIMScheduler", "TCDScheduler")
_ROWS_PER_STEP = {
    "PNDMScheduler": (1, 1),
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
        (2, -1),
    ),
}
"""`(k, extra)` where n steps are `k*n + extra` rows; n rows for others."""

# Names that choose the algorithm of the multistep solver; the two without `++` cannot end at sigma zero.
_ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "dpmsolver++": {"algorithm_type": "dpmsolver++"},
    "sde-dpmsolver++": {"algorithm_type": "sde-dpmsolver++"},
    "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "sde-dpmsolver": {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
}


@dataclass(frozen=True)
class NoiseSchedule:
    """What a checkpoint's `scheduler_config.json` says.

    Attributes:
        config: the file's content.
        options: every option that the config's own class reads, and `_class_name`.
    """

    config: Mapping[str, Any]
    options: Options

    @classmethod
    def from_config(cls, config: Mapping[str, Any], corrects_outdated: bool = False) -> NoiseSchedule:
        """Read a diffusers scheduler config.

        Args:
            corrects_outdated: whether the checkpoint's pipeline in PyTorch sets `steps_offset` to 1 and `clip_sample`
                to false whatever the config says, as StableDiffusionPipeline does and StableDiffusionXLPipeline does
                not.

        Raises:
            InvalidCheckpoint: a class, a key or a value is not served; the text says what was got and what is allowed.
        """
        if not corrects_outdated:
            return cls(config, read_own(config))._with_noise()
        corrected = {"steps_offset": 1, "clip_sample": False}
        # What another class takes over are the keys that the file has.
        written = {**config, **{key: value for key, value in corrected.items() if key in config}}
        return cls(written, read_own({**config, **corrected}))._with_noise()

    def _with_noise(self) -> NoiseSchedule:
        """Return the schedule if its noise grows with the timestep.

        Raises:
            InvalidCheckpoint: it does not.
        """
        if self.parameterisation == "noise":
            with np.errstate(all="ignore"):
                signal = self.alphas_cumprod
                grows = signal[0] < 1 and signal[-1] >= 0 and bool((np.diff(signal[:-1]) <= 0).all())
            if not grows:
                raise InvalidCheckpoint(
                    "the betas in the scheduler config (beta_schedule, beta_start, beta_end or trained_betas) must make"
                    f" noise that grows with the timestep, got signals from {signal[0]} to {signal[-1]}"
                )
        return self

    @property
    def default_sampler(self) -> str:
        """The canonical name of the config's own sampler."""
        return sampler_of(self.options)

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `sample`; `flow` for flow matching."""
        return str(self.options.get("prediction_type", "flow"))

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the model was trained on."""
        return int(self.options["num_train_timesteps"])

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """`(num_train_timesteps,) float32`, the share of signal variance left at each timestep."""
        if self.parameterisation != "noise":
            raise InvalidCheckpoint(f"{self.options['_class_name']} has no noise schedule over timesteps")
        return signal_levels(self.options)

    @property
    def samplers(self) -> tuple[str, ...]:
        """The canonical names of the samplers that a job may choose."""
        return tuple(name for name in DIFFUSERS_CLASSES if self._class_named(name) is not None)

    def options_for(self, sampler: str | None = None, sigmas: str | None = None) -> Options:
        """Return the options of a sampler that a job chooses, made from the config as `from_config` would.

        Args:
            sampler: any name that `resolve_sampler` knows; None for the config's own.
            sigmas: `karras`, `exponential` or `beta`; None for what the name or the config says.

        Raises:
            InvalidRequest: the sampler is not known, not for this checkpoint, or has no such option.
        """
        name, class_name, spacing = self.default_sampler, str(self.options["_class_name"]), sigmas
        if sampler is not None:
            name, named = resolve_sampler(sampler)
            spacing = sigmas or named
            found = self._class_named(name)
            if found is None:
                raise InvalidRequest(
                    f"sampler must be one of {', '.join(self.samplers)} for this checkpoint, whose scheduler is"
                    f" {class_name}, got {brief(sampler)}"
                )
            class_name = found
        if name == self.default_sampler and class_name == self.options["_class_name"]:
            return {**self.options, **self._spacing_options(name, self.options, spacing)}
        try:
            chosen = read_as(self.config, class_name, _ALGORITHMS.get(name, {}))
            return {**chosen, **self._spacing_options(name, chosen, spacing)}
        except InvalidCheckpoint as exc:
            raise InvalidRequest(f"sampler {name} cannot be used with this checkpoint: {exc}") from exc

    @property
    def parameterisation(self) -> str:
        """What the model predicts from: `noise` (a schedule over timesteps), `edm` or `flow`."""
        return PARAMETERISATIONS.get(str(self.options["_class_name"]), "noise")

    def _class_named(self, sampler: str) -> str | None:
        """Return the class of a sampler for models like this one."""
        classes = DIFFUSERS_CLASSES[sampler] or DIFFUSERS_CLASSES["dpmsolver++"]
        if sampler in ("dpmsolver", "sde-dpmsolver") and self.parameterisation != "noise":
            return None
        return next((c for c in classes if PARAMETERISATIONS.get(c, "noise") == self.parameterisation), None)

    def _spacing_options(self, name: str, options: Options, spacing: str | None) -> dict[str, Any]:
        if spacing is None:
            return {}
        if spacing not in SIGMA_SPACINGS:
            raise InvalidRequest(f"sigmas must be one of {', '.join(SIGMA_SPACINGS)}, got {brief(spacing)}")
        if "sigma_schedule" in options and spacing != "beta":
            return {"sigma_schedule": spacing}
        if "use_karras_sigmas" not in options:
            raise InvalidRequest(
                f"sigmas must be left out for the sampler {name} with this checkpoint, which visits the timesteps that"
                f" its config says, got {brief(spacing)}"
            )
        off = {f"use_{kind}_sigmas": False for kind in SIGMA_SPACINGS}
        return {**off, f"use_{spacing}_sigmas": True}


def make_table(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    sampler: str | None = None,
    sigmas: str | None = None,
    eta: float | None = None,
    begin: int = 0,
) -> CoefficientTable:
    """Return the coefficients of a sampler.

    Args:
        schedule: of the checkpoint.
        num_inference_steps: as in the pipeline call; some samplers take more rows.
        sampler: any name that `resolve_sampler` knows; None for the checkpoint's own.
        sigmas: `karras`, `exponential` or `beta` instead of the config's; None for what the name or the config says.
        eta: 0 to 1, how much noise DDIM and TCD add; None for none, as in the pipelines.
        begin: how many of the steps are left out at the start, for a sample that is a picture with noise.

    Raises:
        InvalidRequest: the sampler is not known or not for this checkpoint, it has no such option, or the number of
            steps is not possible.
    """
    options = schedule.options_for(sampler, sigmas)
    class_name = str(options["_class_name"])
    if eta is not None and (isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1):
        raise InvalidRequest(f"eta must be a number from 0 to 1, got {brief(eta)}")
    if eta and class_name not in _CLASSES_WITH_ETA:
        raise InvalidRequest(
            f"eta must be 0 or left out for the sampler {sampler_of(options)}, got {brief(eta)}; ddim and tcd have it"
        )
    _check_steps(schedule, options, num_inference_steps)
    try:
        with np.errstate(all="ignore"):
            steps = METHODS[class_name](options, num_inference_steps, float(eta or 0.0), begin)
            numbers = (np.array(part, np.float32) for part in (steps.rows, steps.levels, steps.init_noise_sigma))
            finite = all(bool(np.isfinite(part).all()) for part in numbers)
    except (ZeroDivisionError, OverflowError):
        finite = False
    if not finite:
        raise InvalidRequest(
            f"the sampler {sampler_of(options)} makes no picture with this checkpoint's scheduler config at"
            f" {num_inference_steps} steps: a coefficient is infinite, as in PyTorch (zero terminal SNR without"
            " v_prediction, or sigmas that coincide); choose another sampler or number of steps"
        )
    return pack(steps, num_inference_steps)


def _check_steps(schedule: NoiseSchedule, options: Options, num_inference_steps: int) -> None:
    per_step, extra = _ROWS_PER_STEP.get(str(options["_class_name"]), (1, 0))
    if options.get("interpolation_type") == "log_linear" and options.get("timestep_type") == "continuous":
        extra = 1
    most, why = (MAX_STEPS - extra) // per_step, f"which asks the model at most {MAX_STEPS:,} times"
    if schedule.parameterisation == "noise" and schedule.num_train_timesteps < most:
        most, why = schedule.num_train_timesteps, "as many timesteps as this checkpoint was trained on"
    if not 1 <= num_inference_steps <= most:
        raise InvalidRequest(
            f"num_inference_steps must be 1 to {most} for the sampler {sampler_of(options)}, {why},"
            f" got {num_inference_steps}"
        )
