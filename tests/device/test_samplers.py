"""The coefficient tables against diffusers' own Flax schedulers, stepping the same nonlinear model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import (
    FlaxDDIMScheduler,
    FlaxDPMSolverMultistepScheduler,
    FlaxEulerDiscreteScheduler,
    FlaxPNDMScheduler,
)

from sdtpu_worker.diffusion.samplers import COLUMNS, SAMPLERS, NoiseSchedule, default_sampler, make_table
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from tests.support.checkpoints import STABLE_DIFFUSION_NOISE

SHAPE = (1, 4, 8, 8)
CLASSES = {
    "pndm": FlaxPNDMScheduler,
    "ddim": FlaxDDIMScheduler,
    "euler": FlaxEulerDiscreteScheduler,
    "dpmsolver++": FlaxDPMSolverMultistepScheduler,
}
LINEAR_NOISE = {**STABLE_DIFFUSION_NOISE, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def nonlinear_model(x: Any, t: Any, np: Any = np) -> Any:
    return np.tanh(x * (0.3 + t / 1500) + 0.1 * np.sin(7 * x)).astype(np.float32)


def run_table(sampler: str, config: dict, steps: int, x: np.ndarray) -> np.ndarray:
    table = make_table(sampler, NoiseSchedule.from_config(config), steps)
    x = x * np.float32(table.init_noise_sigma)
    history = [np.zeros_like(x)] * 3
    for row in table.rows[: table.num_inference_steps]:
        c = dict(zip(COLUMNS, row, strict=True))
        m = nonlinear_model(x * c["c_in"], float(c["t"]))
        h = c["p"] * x + c["q"] * m
        x = c["a"] * x + c["b"] * h + c["c"] * history[0] + c["d"] * history[1] + c["e"] * history[2]
        if c["push"]:
            history = [h, *history[:2]]
    return x


def run_diffusers(sampler: str, config: dict, steps: int, x: np.ndarray) -> np.ndarray:
    scheduler = CLASSES[sampler].from_config(config)
    scheduler = scheduler[0] if isinstance(scheduler, tuple) else scheduler
    state = scheduler.set_timesteps(scheduler.create_state(), steps, SHAPE)

    def step(i, carry):
        x, state = carry
        t = jnp.asarray(state.timesteps)[i]
        m = nonlinear_model(scheduler.scale_model_input(state, x, t), t, jnp)
        return scheduler.step(state, m, t, x, return_dict=False)

    loop = jax.jit(lambda x, state: jax.lax.fori_loop(0, steps, step, (x, state))[0])
    return np.asarray(loop(x * state.init_noise_sigma, state))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_table_steps_like_diffusers_own_scheduler(sampler, steps, prediction_type):
    noise = LINEAR_NOISE if steps == 20 else STABLE_DIFFUSION_NOISE
    config = {**noise, "prediction_type": prediction_type}
    x = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
    ours, theirs = run_table(sampler, config, steps, x), run_diffusers(sampler, config, steps, x)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 1e-5


@pytest.mark.parametrize("option", [{"timestep_spacing": "leading"}, {"solver_type": "heun"}, {"solver_order": 1}])
@pytest.mark.parametrize("sampler", ["euler", "dpmsolver++"])
def test_options_of_the_scheduler_config_are_followed(sampler, option):
    if sampler == "dpmsolver++" and "timestep_spacing" in option:
        # diffusers' Flax class reads a steps_offset that its own config does not have; ours takes it from the file.
        config = {**STABLE_DIFFUSION_NOISE, **option}
        table = make_table(sampler, NoiseSchedule.from_config(config), 20)
        assert table.rows[0, 0] == 20 * (1000 // 21) + 1
        return
    config = {**STABLE_DIFFUSION_NOISE, **option}
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    ours, theirs = run_table(sampler, config, 20, x), run_diffusers(sampler, config, 20, x)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 1e-5


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
def test_every_number_of_steps_gives_finite_rows_inside_the_trained_range(sampler, steps):
    table = make_table(sampler, NoiseSchedule.from_config(STABLE_DIFFUSION_NOISE), steps)
    assert table.num_inference_steps == steps
    assert np.isfinite(table.rows).all()
    assert table.rows[:steps, 0].min() >= 0
    assert table.rows[:steps, 0].max() <= 999


def test_the_cosine_schedule_and_trained_betas_are_read():
    cosine = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    theirs = FlaxDDIMScheduler(beta_schedule="squaredcos_cap_v2").create_state().common.alphas_cumprod
    np.testing.assert_allclose(cosine.alphas_cumprod, theirs, rtol=1e-4, atol=1e-6)
    trained = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2]})
    np.testing.assert_allclose(trained.alphas_cumprod, [0.9, 0.72])


def test_a_sampler_steps_or_config_that_is_not_known_is_refused():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_NOISE)
    with pytest.raises(InvalidRequest, match=r"sampler must be one of pndm, .*got 'heun'"):
        make_table("heun", schedule, 10)
    with pytest.raises(InvalidRequest, match=r"1 to 1000 .* got 1001"):
        make_table("ddim", schedule, 1001)
    with pytest.raises(InvalidCheckpoint, match="prediction_type"):
        NoiseSchedule.from_config({"prediction_type": "sample"})
    with pytest.raises(InvalidCheckpoint, match="beta_schedule"):
        NoiseSchedule.from_config({"beta_schedule": "sigmoid"})


def test_the_default_sampler_is_the_checkpoints_own():
    assert default_sampler({"_class_name": "FlaxDDIMScheduler"}) == "ddim"
    assert default_sampler({"_class_name": "DPMSolverMultistepScheduler"}) == "dpmsolver++"
    assert default_sampler({"_class_name": "LMSDiscreteScheduler"}) == "pndm"
