"""Every sampler as a table of coefficients, one row per evaluation of the model.

With `x` the latents, `m` the guided model output at `(c_in * x, t)`, `z` standard normal noise of the row (from the
job's key and the row's index alone) and `h1, h2, h3` what earlier rows kept, newest first, a row is

    x' = a*x + b*m + c*h1 + d*h2 + e*h3 + n*z
    h  = p*x + q*m + r*z
    if push: (h1, h2, h3) = (h, h1, h2)

with `x`, `m` and `z` of this row in both lines. So samplers, step counts and prediction types are data to one compiled
program. Why so few columns are enough:

* multistep methods (PNDM, LMS, DPM-Solver, DEIS, UniPC) keep their last three outputs in the history;
* methods with inner stages (Heun, DPM2, singlestep DPM-Solver) restart from an earlier sample: its share in the result
  is worked out from the present sample and the history, or kept in the history ready for use;
* UniPC corrects a sample once the model was asked there: a row is the corrector followed by the next predictor;
* stochastic methods add `n*z`; `r` serves DPM++ SDE, whose two stages share a part of one Brownian path.

The last two columns are no part of the step: `s*x0 + u*noise` is a clean sample `x0` brought to the noise level that
`x'` has, which is how a picture replaces what is not to be drawn again.

A sampler writes its steps with linear forms: vectors over the symbols `X, M, H1, H2, H3, Z`, so that a method reads as
in its paper, `x0 = (X - sigma * M) / alpha`, and `make_row` takes the columns from it. Tables are made on the host in
float64 and stored in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdtpu_worker.contract.request import MAX_STEPS

COLUMNS = ("t", "c_in", "a", "b", "c", "d", "e", "n", "p", "q", "r", "push", "s", "u")

Form = np.ndarray
"""`(6,) float64`, a linear form over the symbols below."""
X, M, H1, H2, H3, Z = np.eye(6)
HISTORY = (H1, H2, H3)
NOTHING = np.zeros(6)

Row = np.ndarray
"""`(len(COLUMNS) - 2,) float64`, all columns but `s` and `u`."""


@dataclass(frozen=True)
class CoefficientTable:
    """One sampler at one number of steps.

    Attributes:
        rows: `(MAX_STEPS, len(COLUMNS)) float32`; rows from `num_rows` on are zero and never read.
        num_rows: how many rows count, which is how often the model is asked.
        num_inference_steps: the number of steps that was asked for; PNDM, Heun, DPM2 and others need more rows.
        init_noise_sigma: what the initial unit noise is multiplied by, if the sample starts as noise alone.
        first_level: `(s, u)` of the first row's sample, if it starts as a picture with noise.
        stochastic: some row adds noise.
    """

    rows: np.ndarray
    num_rows: int
    num_inference_steps: int
    init_noise_sigma: float
    first_level: tuple[float, float]
    stochastic: bool


@dataclass(frozen=True)
class Steps:
    """What a sampler makes of a schedule.

    Attributes:
        rows: of the steps.
        levels: `(alpha, sigma)` of each row's sample `alpha*x0 + sigma*noise`, as PyTorch's class adds noise to a
            picture there.
        init_noise_sigma: what the initial unit noise is multiplied by.
    """

    rows: Sequence[Row]
    levels: Sequence[tuple[float, float]]
    init_noise_sigma: float = 1.0


def make_row(t: float, result: Form, keep: Form | None = None, c_in: float = 1.0) -> Row:
    """Return one row.

    Args:
        t: the timestep that the model is told.
        result: `x'`, a form over all symbols.
        keep: what the history gets, a form over `X, M, Z`; None leaves the history as it is.
        c_in: factor of the model's input.
    """
    kept = NOTHING if keep is None else keep
    if np.any(kept[2:5]):
        raise AssertionError("the history keeps forms of this row's sample, output and noise only")
    return np.array([t, c_in, *result, kept[0], kept[1], kept[5], float(keep is not None)])


def pack(steps: Steps, num_inference_steps: int) -> CoefficientTable:
    """Return the table of at most `MAX_STEPS` rows."""
    rows = np.zeros((MAX_STEPS, len(COLUMNS)), np.float32)
    rows[: len(steps.rows), :-2] = steps.rows
    rows[: len(steps.rows), -2:] = [*steps.levels[1:], (1.0, 0.0)]
    return CoefficientTable(
        rows=rows,
        num_rows=len(steps.rows),
        num_inference_steps=num_inference_steps,
        init_noise_sigma=float(steps.init_noise_sigma),
        first_level=steps.levels[0],
        stochastic=bool(rows[:, [COLUMNS.index("n"), COLUMNS.index("r")]].any()),
    )


def step_reference(
    row: np.ndarray, x: np.ndarray, m: np.ndarray, history: Sequence[np.ndarray], noise: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return what one row makes of a sample and a history: the step's definition in NumPy, which programs must match.

    Args:
        row: `(len(COLUMNS),) float32`, a row of a table.
        x: the sample, float32 of any shape.
        m: the guided model output at `(c_in * x, t)`, as `x`.
        history: `h1, h2, h3`, each as `x`, zeros before the first row.
        noise: standard normal, as `x`.
    """
    k = dict(zip(COLUMNS, row, strict=True))
    h1, h2, h3 = history
    result = k["a"] * x + k["b"] * m + k["c"] * h1 + k["d"] * h2 + k["e"] * h3 + k["n"] * noise
    kept = k["p"] * x + k["q"] * m + k["r"] * noise
    return result, [kept, h1, h2] if k["push"] > 0 else list(history)
