"""The coefficient tables against PyTorch's schedulers, which stepped the same nonlinear model (`tools/oracle`)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.diffusion.samplers import COLUMNS, CoefficientTable, NoiseSchedule, make_table, step_reference
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest
from tests.support.sampler_cases import NOISE, Case, cases, initial_noise, kept, model, noise_of_row, picture

GOLDEN = Path(__file__).parent / "golden"
CASES = list(cases())
CASES_OF_CLASS: dict[str, list[int]] = defaultdict(list)
for number, each in enumerate(CASES):
    CASES_OF_CLASS[each.scheduler].append(number)
STABLE_DIFFUSION = {**NOISE, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
TWO_STAGES = ("heun", "dpm2", "dpm2_ancestral", "dpmsolver++_sde")
# UniPC and DEIS make no picture of a timestep that is visited twice, as in PyTorch.
MOST_STEPS = {"pndm": 999, "lcm": 50, "tcd": 50, **dict.fromkeys(TWO_STAGES, 500), "unipc": 999, "deis": 999}


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, np.ndarray]:
    with np.load(GOLDEN / "samplers.npz") as file:
        samples, rows = file["samples"], file["rows"]
    assert len(samples) == len(CASES), "run tools/oracle/samplers.py again: the cases have changed"
    return samples, rows


def make_case_table(case: Case) -> CoefficientTable:
    sampler = None if case.scheduler == case.config["_class_name"] else case.scheduler
    schedule = NoiseSchedule.from_config(case.config)
    return make_table(schedule, case.steps, sampler=sampler, eta=case.eta or None, begin=case.begin)


def run_table(table: CoefficientTable, from_picture: bool = False) -> np.ndarray:
    x = initial_noise() * np.float32(table.init_noise_sigma)
    if from_picture:
        signal, noise = table.first_level
        x = (signal * picture() + noise * initial_noise()).astype(np.float32)
    history = [np.zeros_like(x)] * 3
    t, c_in, s, u = (COLUMNS.index(name) for name in ("t", "c_in", "s", "u"))
    for i, row in enumerate(table.rows[: table.num_rows]):
        x, history = step_reference(row, x, model(x * row[c_in], float(row[t])), history, noise_of_row(i))
        if from_picture:
            x = np.where(kept(), row[s] * picture() + row[u] * initial_noise(), x)
    return x


def bound(case: Case) -> float:
    """Return how far float32 takes PyTorch from the exact result; our own rounding is below 2e-5 in every case."""
    if case.config.get("rescale_betas_zero_snr"):
        return 5e-4  # in sigma the path starts at 4096: PyTorch takes 4096 from 4096 to get a number near one
    if case.scheduler == "DEISMultistepScheduler" and case.config.get("solver_order") == 3:
        return 3e-4  # PyTorch's integrals are differences of large numbers
    return 5e-5


@pytest.mark.parametrize("scheduler", list(CASES_OF_CLASS))
def test_a_table_steps_like_pytorchs_scheduler(scheduler, golden):
    samples, rows = golden
    compared = [i for i in CASES_OF_CLASS[scheduler] if rows[i] > 0]
    assert len(compared) >= 20
    for i in compared:
        table = make_case_table(CASES[i])
        assert (table.num_rows, table.num_inference_steps) == (rows[i], CASES[i].steps), CASES[i]
        drawn = run_table(table, CASES[i].strength is not None)
        assert np.abs(drawn - samples[i]).max() <= bound(CASES[i]) * np.abs(samples[i]).max(), CASES[i]


def test_a_case_that_does_not_run_in_pytorch_gives_finite_rows_or_says_why_not(golden):
    _, rows = golden
    for i in np.flatnonzero(rows == 0):
        said = ""
        try:
            assert np.isfinite(make_case_table(CASES[i]).rows).all(), CASES[i]
        except (InvalidRequest, InvalidCheckpoint) as exc:
            said = str(exc)
        assert not said or "must be" in said or "makes no picture" in said, (CASES[i], said)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 999, 1000])
@pytest.mark.parametrize("sampler", NoiseSchedule.from_config(STABLE_DIFFUSION).samplers)
def test_every_number_of_steps_gives_rows_inside_the_trained_range_or_an_error(sampler, steps):
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    if steps > MOST_STEPS.get(sampler, 1000):
        with pytest.raises(InvalidRequest, match=r"num_inference_steps must be 1 to|makes no picture"):
            make_table(schedule, steps, sampler)
        return
    table = make_table(schedule, steps, sampler)
    expected = {"pndm": steps + (steps > 1)}.get(sampler, 2 * steps - 1 if sampler in TWO_STAGES else steps)
    assert table.num_rows == expected <= MAX_STEPS
    assert np.isfinite(table.rows).all()
    timesteps = table.rows[: table.num_rows, 0]
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert not table.rows[table.num_rows :].any()


@pytest.mark.parametrize(
    ("sampler", "most"), [("ddim", 1000), ("pndm", 999), *((name, 500) for name in TWO_STAGES), ("lcm", 50)]
)
def test_the_most_steps_are_told(sampler, most):
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    assert make_table(schedule, most, sampler).num_rows <= MAX_STEPS
    with pytest.raises(InvalidRequest, match=f"num_inference_steps must be 1 to {most} .*got {most + 1}"):
        make_table(schedule, most + 1, sampler)
    with pytest.raises(InvalidRequest, match=r"num_inference_steps must be 1 to .*got 0"):
        make_table(schedule, 0, sampler)


def test_only_samplers_with_noise_add_some():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    stochastic = {name for name in schedule.samplers if make_table(schedule, 10, name).stochastic}
    with_noise = {"sde-dpmsolver++", "sde-dpmsolver", "dpmsolver++_sde"}
    assert stochastic == {"ddpm", "euler_ancestral", "dpm2_ancestral", "lcm", *with_noise}
    assert make_table(schedule, 10, "ddim", eta=0.5).stochastic
    assert make_table(schedule, 10, "tcd", eta=0.3).stochastic


def test_the_two_stages_of_a_stochastic_step_share_a_brownian_path():
    """The noise of a whole step has unit variance, and its first half is the first stage's."""
    table = make_table(NoiseSchedule.from_config(STABLE_DIFFUSION), 10, "DPM++ SDE")
    n, r, c = (COLUMNS.index(name) for name in "nrc")
    path = NoiseSchedule.from_config(STABLE_DIFFUSION).options_for("euler")
    assert path["timestep_spacing"] == "linspace"
    for first, second in zip(table.rows[0:18:2], table.rows[1:18:2], strict=True):
        assert first[n] > 0
        assert first[r] > 0
        assert second[c] == 1
        assert 0.3 < (first[r] / np.hypot(first[r], second[n])) < 1


def test_eta_scales_ddims_noise():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    n = COLUMNS.index("n")
    half, whole = (make_table(schedule, 10, "ddim", eta=eta).rows[:10, n] for eta in (0.5, 1.0))
    np.testing.assert_allclose(whole, 2 * half, rtol=1e-6)
    none = make_table(schedule, 10, "ddim", eta=0.0)
    assert not none.stochastic
    np.testing.assert_array_equal(none.rows, make_table(schedule, 10, "ddim").rows)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), "1", True])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(InvalidRequest, match="eta must be a number from 0 to 1"):
        make_table(NoiseSchedule.from_config(STABLE_DIFFUSION), 10, "ddim", eta=eta)


def test_eta_and_sigmas_are_refused_where_a_sampler_has_none():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    with pytest.raises(InvalidRequest, match=r"eta must be 0 or left out for the sampler euler, got 0\.5"):
        make_table(schedule, 10, "euler", eta=0.5)
    assert make_table(schedule, 10, "euler", eta=0).num_rows == 10
    for name in ("ddim", "pndm", "lcm", "euler_ancestral", "Euler a Karras"):
        with pytest.raises(InvalidRequest, match="sigmas must be left out for the sampler"):
            make_table(schedule, 10, name, sigmas="karras")
    with pytest.raises(InvalidRequest, match="sigmas must be one of karras, exponential, beta, got 'cosine'"):
        make_table(schedule, 10, "euler", sigmas="cosine")


def test_sigmas_come_from_the_job_before_the_name_before_the_config():
    config = {**NOISE, "_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}
    schedule = NoiseSchedule.from_config(config)

    def rows(sampler: str | None = None, sigmas: str | None = None) -> np.ndarray:
        return make_table(schedule, 10, sampler, sigmas).rows

    np.testing.assert_array_equal(rows(), rows("euler", "exponential"))
    np.testing.assert_array_equal(rows("Euler Karras"), rows(None, "karras"))
    np.testing.assert_array_equal(rows("Euler Karras", "beta"), rows("euler", "beta"))
    assert not np.array_equal(rows(), rows(None, "karras"))


def test_a_row_is_what_its_docstring_says():
    rng = np.random.default_rng(0)
    row = rng.standard_normal(len(COLUMNS)).astype(np.float32)
    x, m, h1, h2, h3, z = rng.standard_normal((6, 5)).astype(np.float32)
    k = dict(zip(COLUMNS, row, strict=True))
    for push in (0.0, 1.0):
        row[COLUMNS.index("push")] = push
        result, history = step_reference(row, x, m, [h1, h2, h3], z)
        expected = k["a"] * x + k["b"] * m + k["c"] * h1 + k["d"] * h2 + k["e"] * h3 + k["n"] * z
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        kept = [k["p"] * x + k["q"] * m + k["r"] * z, h1, h2] if push else [h1, h2, h3]
        np.testing.assert_allclose(history, kept, rtol=1e-6)


def test_zero_terminal_snr_needs_v_prediction():
    config = {
        **NOISE,
        "_class_name": "DDIMScheduler",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alphas_cumprod[-1] == 0
    with pytest.raises(InvalidRequest, match=r"makes no picture .* a coefficient is infinite, as in PyTorch"):
        make_table(schedule, 10)
    assert make_table(NoiseSchedule.from_config({**config, "prediction_type": "v_prediction"}), 10).num_rows == 10
