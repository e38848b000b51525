"""Scheduler configs: each key of each class is honoured, refused with a reason, or known to have no effect."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtpu_worker.diffusion.samplers import METHODS, NoiseSchedule, make_table
from sdtpu_worker.diffusion.samplers.options import OPTIONS, WITHOUT_EFFECT
from sdtpu_worker.diffusion.samplers.read import KNOWN_KEYS
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from tests.support.sampler_cases import NOISE

ROOT = Path(__file__).parents[2]
FACTS = json.loads((Path(__file__).parent / "golden" / "samplers.json").read_text())
EVERY_OPTION = [(name, key) for name, options in OPTIONS.items() for key in options]
# What PyTorch's class has for a default and is refused, with what a config must say instead.
NEEDED = {"PNDMScheduler": {"skip_prk_steps": True}, "DDIMScheduler": {"clip_sample": False}}
NEEDED["DDPMScheduler"] = NEEDED["DDIMScheduler"]
SMALLEST = {"final_sigmas_type": "sigma_min"}

# A value that is not the default, and what must be in the config beside it for the value to matter.
CHANGES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "num_train_timesteps": [(900, {})],
    "beta_start": [(0.0005, {})],
    "beta_end": [(0.03, {})],
    "beta_schedule": [("scaled_linear", {}), ("linear", {}), ("squaredcos_cap_v2", {}), ("sigmoid", {})],
    "trained_betas": [([0.001] * 1000, {})],
    "timestep_spacing": [("leading", {}), ("trailing", {}), ("linspace", {})],
    "steps_offset": [(3, {"timestep_spacing": "leading"})],
    "prediction_type": [("v_prediction", {}), ("sample", {})],
    "use_karras_sigmas": [(True, {})],
    "use_exponential_sigmas": [(True, {})],
    "use_beta_sigmas": [(True, {})],
    "sigma_min": [(0.2, {"use_beta_sigmas": True}), (0.2, {})],
    "sigma_max": [(9.0, {"use_beta_sigmas": True}), (9.0, {})],
    "rescale_betas_zero_snr": [(True, {"prediction_type": "v_prediction"})],
    "final_sigmas_type": [("sigma_min", {})],
    "set_alpha_to_one": [(True, {}), (False, {})],
    "variance_type": [("fixed_large", {})],
    "interpolation_type": [("log_linear", {})],
    "timestep_type": [("continuous", {"prediction_type": "v_prediction"})],
    "lambda_min_clipped": [(-2.0, {})],
    "solver_order": [(1, {}), (3, {})],
    "solver_type": [("heun", {}), ("bh1", {"solver_order": 3})],
    "lower_order_final": [(False, {**SMALLEST, "solver_order": 3}), (True, SMALLEST), (False, {})],
    "algorithm_type": [("sde-dpmsolver++", {}), ("dpmsolver", SMALLEST), ("sde-dpmsolver", SMALLEST)],
    "euler_at_final": [(True, {**SMALLEST, "lower_order_final": False})],
    "use_lu_lambdas": [(True, {})],
    "predict_x0": [(False, SMALLEST)],
    "disable_corrector": [([0, 1], {})],
    "original_inference_steps": [(60, {})],
    "timestep_scaling": [(2.0, {})],
    "sigma_data": [(1.0, {})],
    "sigma_schedule": [("exponential", {})],
    "rho": [(5.0, {})],
    "shift": [(3.0, {})],
    "stochastic_sampling": [(True, {})],
}
DISTILLED = ("LCMScheduler", "TCDScheduler", "DPMSolverSinglestepScheduler")
UNREAD_BY_DISTILLED = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "timestep_scaling")
CHANGES_NOTHING = {
    ("EDMEulerScheduler", "num_train_timesteps"): "the sigmas are the scheduler's own",
    ("EDMDPMSolverMultistepScheduler", "num_train_timesteps"): "the sigmas are the scheduler's own",
    ("EDMDPMSolverMultistepScheduler", "euler_at_final"): "the last step is of the first order or of no length",
    ("DPMSolverMultistepScheduler", "variance_type"): "PyTorch's class looks for learned variances only",
    ("DPMSolverSinglestepScheduler", "variance_type"): "PyTorch's class looks for learned variances only",
    ("DEISMultistepScheduler", "algorithm_type"): "there is one",
    ("DEISMultistepScheduler", "solver_type"): "there is one",
}


def make_config(name: str, **changes: Any) -> dict[str, Any]:
    return {"_class_name": name, **NEEDED.get(name, {}), **changes}


def rows_of(config: dict[str, Any], steps: int = 10) -> np.ndarray:
    table = make_table(NoiseSchedule.from_config(config), steps)
    return np.append(table.rows, table.init_noise_sigma)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_keys_and_defaults_of_a_class_are_pytorchs(name):
    theirs = FACTS["defaults"][name]
    for key, default in theirs.items():
        if key in OPTIONS[name]:
            ours = OPTIONS[name][key].default
            assert (list(ours) if isinstance(ours, tuple) else ours) == default, key
        else:
            assert key in WITHOUT_EFFECT or (name in DISTILLED and key in UNREAD_BY_DISTILLED), key
    hidden = {"sigma_min", "sigma_max"}  # read by `_convert_to_karras` of every class, wherever the config has them
    unknown = set(OPTIONS[name]) - set(theirs) - hidden
    assert unknown <= {"thresholding"}


@pytest.mark.parametrize(("name", "key"), EVERY_OPTION)
def test_an_option_changes_the_rows_or_only_its_default_is_served(name, key):
    option = OPTIONS[name][key]
    if (name, key) in CHANGES_NOTHING:
        return
    candidates = [
        (value, beside)
        for value, beside in CHANGES.get(key, [])
        if option.serves(value)
        and value != option.default
        and all(other in OPTIONS[name] and OPTIONS[name][other].serves(v) for other, v in beside.items())
    ]
    if not candidates:
        served = [value for value in (True, False, None, "zero", "deis", "logrho") if option.serves(value)]
        assert served in ([True], [False], [None])
        return
    changed = (
        not np.array_equal(rows_of(make_config(name, **beside)), rows_of(make_config(name, **beside, **{key: value})))
        for value, beside in candidates
    )
    assert any(changed)


@pytest.mark.parametrize(("name", "key"), EVERY_OPTION)
def test_a_value_that_is_not_served_is_refused_with_what_is(name, key):
    for value in ("nonsense", {"a": 1}, float("nan"), [{}], -(10**400)):
        with pytest.raises(InvalidCheckpoint, match=rf"^{key} in the scheduler config must be .+ for {name}, got "):
            NoiseSchedule.from_config(make_config(name, **{key: value}))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_key_that_the_class_does_not_read_changes_nothing_and_one_that_none_reads_is_refused(name):
    values = {"use_karras_sigmas": True, "skip_prk_steps": False, "clip_sample": True, "solver_order": 7, "shift": 9.0}
    unread = {key: value for key, value in values.items() if key not in OPTIONS[name]}
    kept = {key: "anything" for key in WITHOUT_EFFECT if key != "_class_name"}
    np.testing.assert_array_equal(rows_of(make_config(name)), rows_of(make_config(name, **unread, **kept)))
    with pytest.raises(
        InvalidCheckpoint, match=r"'karras_sigmas' in the scheduler config is not a key of any .* got True"
    ):
        NoiseSchedule.from_config(make_config(name, karras_sigmas=True))


@pytest.mark.parametrize(
    "name",
    ["SASolverScheduler", "IPNDMScheduler", "KarrasVeScheduler", "DDIMInverseScheduler", "EulerDiscrete", "", None, 7],
)
def test_a_class_that_is_not_served_is_refused_with_those_that_are(name):
    with pytest.raises(
        InvalidCheckpoint, match="_class_name in the scheduler config must be one of PNDMScheduler, DDIM"
    ):
        NoiseSchedule.from_config({**NOISE, "_class_name": name})
    with pytest.raises(InvalidCheckpoint, match="got none; save the checkpoint"):
        NoiseSchedule.from_config(NOISE)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps .* must be true .*Runge-Kutta"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample .* must be false .*clips what the model predicts"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding .* must be false .*clips"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type .*predict their variance"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting .*picture's size"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "final_sigmas_type .* sigma_min .*dpmsolver"),
        (
            "DPMSolverSinglestepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order .* must be 1 or 2",
        ),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0 .* must be true .*'zero'"),
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "only one of use_karras_sigmas and use_beta_sigmas",
        ),
        ("EDMEulerScheduler", {"sigma_min": 9.0, "sigma_max": 3.0}, "sigma_min .* below sigma_max"),
        ("LCMScheduler", {"original_inference_steps": 2000}, "original_inference_steps .* at most .* 1000, got 2000"),
        ("EulerDiscreteScheduler", {"predict_epsilon": False}, "'predict_epsilon'"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas .* num_train_timesteps numbers, 1000, got 2"),
        ("HeunDiscreteScheduler", {"beta_start": 0, "beta_end": 0}, "noise that grows with the timestep"),
        ("HeunDiscreteScheduler", {"trained_betas": [0.0] * 1000}, "noise that grows with the timestep"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(name, changes, message):
    with pytest.raises(InvalidCheckpoint, match=message):
        NoiseSchedule.from_config(make_config(name, **changes))


def test_stable_diffusions_pipeline_corrects_outdated_configs():
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": True, "steps_offset": 0}
    with pytest.raises(InvalidCheckpoint, match="clip_sample"):
        NoiseSchedule.from_config(config)
    corrected = NoiseSchedule.from_config(config, corrects_outdated=True)
    written = NoiseSchedule.from_config({**config, "clip_sample": False, "steps_offset": 1})
    for sampler in (None, "euler", "ddpm"):
        ours, theirs = (make_table(schedule, 10, sampler).rows for schedule in (corrected, written))
        np.testing.assert_array_equal(ours, theirs)


def test_a_job_may_take_the_samplers_of_its_kind_of_model_only():
    flow = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert flow.samplers == ("euler",)
    assert (flow.default_sampler, flow.prediction_type) == ("euler", "flow")
    edm = NoiseSchedule.from_config({"_class_name": "EDMDPMSolverMultistepScheduler"})
    assert edm.samplers == ("euler", "dpmsolver++", "sde-dpmsolver++")
    assert make_table(edm, 10, "Euler Karras").num_rows == 10
    for schedule in (flow, edm):
        with pytest.raises(InvalidRequest, match=r"sampler must be one of euler.* for this checkpoint, .* got 'ddim'"):
            make_table(schedule, 10, "ddim")
    with pytest.raises(InvalidRequest, match="sigmas must be left out"):
        make_table(edm, 10, sigmas="beta")


def test_a_sampler_that_the_config_makes_impossible_is_the_requests_mistake():
    config = {**NOISE, "_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}
    with pytest.raises(InvalidRequest, match=r"sampler euler_ancestral cannot be used with this .*: prediction_type"):
        make_table(NoiseSchedule.from_config(config), 10, "Euler a")


def test_the_former_flax_classes_sample_as_they_did():
    config = {**NOISE, "_class_name": "FlaxDPMSolverMultistepScheduler"}
    assert NoiseSchedule.from_config(config).options["final_sigmas_type"] == "sigma_min"
    assert NoiseSchedule.from_config({**config, "_class_name": "FlaxDDIMScheduler"}).default_sampler == "ddim"


SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OLD = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
REAL = {
    "stable-diffusion-v1-5": ({**SD, **OLD, "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"}, "pndm"),
    "stable-diffusion-2-1": (
        {**SD, **OLD, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
        "ddim",
    ),
    "stable-diffusion-xl-base-1.0": (
        {
            **SD,
            **OLD,
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        "euler",
    ),
    "sdxl-turbo": (
        {
            **SD,
            **OLD,
            "_class_name": "EulerAncestralDiscreteScheduler",
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "trailing",
            "use_karras_sigmas": False,
        },
        "euler_ancestral",
    ),
    "LCM_Dreamshaper_v7": (
        {
            **SD,
            "_class_name": "LCMScheduler",
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "sample_max_value": 1.0,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "thresholding": False,
            "timestep_spacing": "leading",
            "trained_betas": None,
            "original_inference_steps": 50,
        },
        "lcm",
    ),
    "playground-v2.5": (
        {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "dynamic_thresholding_ratio": 0.995,
            "euler_at_final": False,
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "rho": 7.0,
            "sample_max_value": 1.0,
            "sigma_data": 0.5,
            "sigma_max": 80.0,
            "sigma_min": 0.002,
            "solver_order": 2,
            "solver_type": "midpoint",
            "thresholding": False,
        },
        "dpmsolver++",
    ),
    "stable-diffusion-3-medium": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        "euler",
    ),
}


@pytest.mark.parametrize("name", list(REAL))
def test_the_configs_of_well_known_checkpoints_are_served(name):
    config, sampler = REAL[name]
    schedule = NoiseSchedule.from_config(config)
    assert schedule.default_sampler == sampler
    assert make_table(schedule, 4).num_rows >= 4


def test_every_class_has_rows_and_a_place_on_the_page_of_samplers():
    assert set(OPTIONS) == set(METHODS)
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.render((ROOT / "docs/reference/samplers.md").read_text(), "reference/samplers.md")
    sections = dict(section.split("\n", 1) for section in page.split("\n### ")[1:])
    assert set(sections) == set(OPTIONS)
    for name, options in OPTIONS.items():
        for key, option in options.items():
            (row,) = (line for line in sections[name].splitlines() if line.startswith(f"| `{key}` |"))
            assert option.allowed in row
            assert option.reason in row
    assert all(f"`{key}`" in page for key in KNOWN_KEYS)
