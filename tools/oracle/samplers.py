"""Run PyTorch's schedulers in every case of `tests/support/sampler_cases.py` and write what comes out.

    python -m venv oracle
    oracle/bin/pip install torch diffusers==0.42.1 scipy torchsde
    PYTHONPATH=. oracle/bin/python tools/oracle/samplers.py        # four minutes on one core

Writes `tests/device/golden/samplers.npz`: `samples` (cases, 4, 2, 2) float32, the final samples, with NaN where the
scheduler does not run, and `rows` (cases,) int16, how often the model was asked, 0 where it does not run; and
`samplers.json`: the versions, the defaults of every class, and why cases do not run.

A case follows the pipelines: initial noise times `init_noise_sigma`, `scale_model_input`, the scheduler's own
`timesteps`, `eta` where `step` takes it. The noise of a row is that of the cases, and DPM++ SDE's Brownian path is put
together of it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from tests.support.sampler_cases import SHAPE, Case, cases, initial_noise, kept, model, noise_of_row, picture

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden"
_DOES_NOT_RUN = (ValueError, NotImplementedError, RuntimeError, IndexError, UnboundLocalError, AssertionError)


class Noise:
    """The noise of the row that runs, in the places where schedulers draw theirs.

    Args:
        of_row: returns the noise of a row, `(1, C, h, w) float32`.
    """

    def __init__(self, of_row: Callable[[int], np.ndarray] = noise_of_row) -> None:
        self.of_row, self.row = of_row, 0

    def randn_tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stand for `diffusers.utils.torch_utils.randn_tensor`."""
        return torch.from_numpy(self.of_row(self.row))

    def make_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for `BrownianTreeNoiseSampler`: the second half's path continues the first half's."""
        middle = 0.0

        def sample(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
            nonlocal middle
            noise = self.of_row(self.row)
            if self.row % 2 == 0:
                middle = float(sigma_next)
            else:
                share = math.sqrt((float(sigma) - middle) / (float(sigma) - float(sigma_next)))
                noise = share * self.of_row(self.row - 1) + math.sqrt(1 - share**2) * noise
            return torch.from_numpy(noise.astype(np.float32))

        return sample


def run(case: Case, noise: Noise) -> tuple[np.ndarray, int]:
    """Return the final sample and how often the model was asked."""
    source = getattr(diffusers, case.config["_class_name"]).from_config(dict(case.config))
    scheduler = getattr(diffusers, case.scheduler).from_config(source.config)
    module = importlib.import_module(type(scheduler).__module__)
    for name, stand_in in (("randn_tensor", noise.randn_tensor), ("BrownianTreeNoiseSampler", noise.make_sampler)):
        if hasattr(module, name):
            setattr(module, name, stand_in)
    scheduler.set_timesteps(case.steps)
    options = {"eta": case.eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    unit, clean, stays = (torch.from_numpy(each) for each in (initial_noise(), picture(), kept()))
    x, timesteps = unit * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
    if case.strength is not None:  # as in the pipelines for image to image and inpainting
        begin = case.begin * scheduler.order
        timesteps = timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(clean, unit, timesteps[:1])
    for noise.row, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(scaled.float().numpy(), float(t))
        x = scheduler.step(torch.from_numpy(m), t, x, **options, return_dict=False)[0]
        if case.strength is not None:
            then = timesteps[noise.row + 1 : noise.row + 2]
            x = torch.where(stays, scheduler.add_noise(clean, unit, then) if len(then) else clean, x)
    return x.float().numpy(), len(timesteps)


def read_defaults(name: str) -> dict[str, Any]:
    """Return the keys that a class reads from its config, with their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in ("self", "kwargs")}


def main() -> None:
    """Run all cases and write the golden files."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    samples, rows, errors, noise = [], [], {}, Noise()
    for i, case in enumerate(cases()):
        try:
            sample, count = run(case, noise)
        except _DOES_NOT_RUN as exc:
            sample, count = np.full(SHAPE, np.nan, np.float32), 0
            errors[i] = f"{type(exc).__name__}: {str(exc)[:60]}"
        if count and not np.isfinite(sample).all():
            sample, count, errors[i] = np.full(SHAPE, np.nan, np.float32), 0, "not finite"
        samples.append(sample[0])
        rows.append(count)
    np.savez_compressed(GOLDEN / "samplers.npz", samples=np.stack(samples), rows=np.array(rows, np.int16))
    defaults = {name: read_defaults(name) for name in sorted({case.scheduler for case in cases()})}
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    facts = {**versions, "defaults": defaults, "does not run": errors}
    (GOLDEN / "samplers.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(samples)} cases, {len(errors)} of them do not run in PyTorch")


if __name__ == "__main__":
    main()
