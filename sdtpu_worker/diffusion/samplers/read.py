"""A scheduler config read strictly: every key is honoured, known to have no effect, or an error with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtpu_worker.contract.samplers import DIFFUSERS_CLASSES, SIGMA_SPACINGS
from sdtpu_worker.diffusion.samplers.options import OPTIONS, WITHOUT_EFFECT
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.redaction import brief

Options = dict[str, Any]

KNOWN_KEYS = frozenset(WITHOUT_EFFECT).union(*OPTIONS.values())
"""Every key that some class of diffusers reads, as far as they are served."""

OLD_KEYS = {"predict_epsilon": (True, "a key of diffusers before 0.9; prediction_type says it now")}
"""Keys that the current classes no longer read, with the one value that changes nothing."""

PARAMETERISATIONS = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
}
"""What a model must predict for a class; a noise schedule for classes that are not named."""

_SAMPLER_OF_CLASS = {name: sampler for sampler, names in DIFFUSERS_CLASSES.items() for name in names}


def class_of(config: Mapping[str, Any]) -> str:
    """Return the scheduler class that a config names, without the prefix of diffusers' former Flax classes.

    Raises:
        InvalidCheckpoint: it names none, or one that is not served.
    """
    named = config.get("_class_name")
    name = named.removeprefix("Flax") if isinstance(named, str) else None
    if name is None or name not in OPTIONS:
        raise InvalidCheckpoint(
            f"_class_name in the scheduler config must be one of {', '.join(OPTIONS)},"
            f" got {brief(named) if named is not None else 'none'}; save the checkpoint with one of these schedulers"
        )
    return name


def sampler_of(options: Mapping[str, Any]) -> str:
    """Return the canonical sampler name of a class with its options."""
    algorithm = options.get("algorithm_type")
    sampler = _SAMPLER_OF_CLASS[options["_class_name"]]
    return str(algorithm) if sampler == "dpmsolver++" else sampler


def read_own(config: Mapping[str, Any]) -> Options:
    """Return the options of a checkpoint's own scheduler: every key that its class reads, and `_class_name`.

    Raises:
        InvalidCheckpoint: a class, key or value is not served; the text says what was got and what is allowed.
    """
    name = class_of(config)
    for key, value in config.items():
        if key in OLD_KEYS and value is OLD_KEYS[key][0]:
            continue
        if key not in KNOWN_KEYS:
            raise InvalidCheckpoint(
                f"{brief(key)} in the scheduler config is not a key of any scheduler that is served, got"
                f" {brief(value)}; remove it if {name} does not read it"
            )
    return _read(name, {**_flax_defaults(config), **config})


def read_as(config: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Options:
    """Return the options of another class, made from a checkpoint's config as diffusers' `from_config` does.

    Keys that the class reads are kept, others get its defaults. Two defaults are ours, since they say what the class is
    used for here: PNDM skips its Runge-Kutta steps, and nothing is clipped unless the config asks for it.

    Args:
        changes: options that the sampler's name sets.

    Raises:
        InvalidCheckpoint: a value is not served.
    """
    ours = {"skip_prk_steps": True, "clip_sample": False}
    return _read(name, {**ours, **config, **changes})


def _flax_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return defaults that diffusers' former Flax classes had and PyTorch's do not have."""
    is_flax = str(config.get("_class_name", "")).startswith("Flax")
    return {"final_sigmas_type": "sigma_min", "clip_sample": False} if is_flax else {}


def _read(name: str, config: Mapping[str, Any]) -> Options:
    options: Options = {"_class_name": name}
    for key, option in OPTIONS[name].items():
        value = config.get(key, option.default)
        if isinstance(value, str):
            value = option.means.get(value, value)
        if not option.serves(value):
            default = "" if key in config else ", its default"
            reason = f"; {option.reason}" if option.reason else ""
            raise InvalidCheckpoint(
                f"{key} in the scheduler config must be {option.allowed} for {name}, got {brief(value)}{default}"
                f"{reason}"
            )
        options[key] = value
    _check_together(name, options)
    return options


def _check_together(name: str, options: Options) -> None:
    """Refuse options that exclude each other."""
    respaced = [f"use_{kind}_sigmas" for kind in SIGMA_SPACINGS if options.get(f"use_{kind}_sigmas")]
    if len(respaced) > 1:
        raise InvalidCheckpoint(f"only one of {' and '.join(respaced)} in the scheduler config may be true")
    if options.get("sigma_min") and options.get("sigma_max") and options["sigma_min"] >= options["sigma_max"]:
        raise InvalidCheckpoint(
            f"sigma_min in the scheduler config must be below sigma_max, got {brief(options['sigma_min'])} and"
            f" {brief(options['sigma_max'])}"
        )
    if options.get("original_inference_steps", 0) > options["num_train_timesteps"]:
        raise InvalidCheckpoint(
            f"original_inference_steps in the scheduler config must be at most num_train_timesteps,"
            f" {options['num_train_timesteps']}, got {brief(options['original_inference_steps'])}"
        )
    betas = options.get("trained_betas")
    if betas is not None and len(betas) != options["num_train_timesteps"]:
        raise InvalidCheckpoint(
            f"trained_betas in the scheduler config must be num_train_timesteps numbers,"
            f" {options['num_train_timesteps']}, got {len(betas)}"
        )
    _check_solver(name, options)


def _check_solver(name: str, options: Options) -> None:
    """Refuse solver options that exclude each other."""
    algorithm = options.get("algorithm_type", "")
    if algorithm in ("dpmsolver", "sde-dpmsolver") and options["final_sigmas_type"] == "zero":
        raise InvalidCheckpoint(
            f"final_sigmas_type in the scheduler config must be sigma_min for algorithm_type {algorithm}, got 'zero';"
            " PyTorch's class refuses it too"
        )
    third = options.get("solver_order") == 3
    if third and (
        algorithm == "sde-dpmsolver" or (algorithm == "sde-dpmsolver++" and name != "DPMSolverMultistepScheduler")
    ):
        raise InvalidCheckpoint(
            f"solver_order in the scheduler config must be 1 or 2 for {name} with algorithm_type {algorithm}, got 3"
        )
    if name == "UniPCMultistepScheduler" and options["final_sigmas_type"] == "zero":
        for key in ("lower_order_final", "predict_x0"):
            if not options[key]:
                raise InvalidCheckpoint(
                    f"{key} in the scheduler config must be true for {name} with final_sigmas_type 'zero', got False;"
                    " PyTorch's class makes no picture of it either"
                )
