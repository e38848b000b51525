"""The benchmark of the host's work for a tick: its stand-in has as many parameters as are asked for, each of use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from benchmarks import dispatch
from sdtpu_worker.diffusion.abstract_checkpoint import read_abstract
from sdtpu_worker.diffusion.engine import Engine


def test_the_stand_in_has_as_many_parameters_as_the_real_model():
    real = read_abstract("sdxl", jnp.bfloat16).params
    assert {part: len(params) for part, params in real.items()} == dispatch.SDXL
    stand_in = dispatch.stand_in(sum(dispatch.SDXL.values())).params
    assert {part: len(params) for part, params in stand_in.items()} == dispatch.SDXL


@pytest.mark.timeout(200)
def test_every_part_of_a_tick_is_measured_and_the_program_reads_every_parameter(devices, compile_cache):
    engine = Engine(dispatch.stand_in(20), devices[:2], 2, None, compile_cache)
    (tick,) = engine._programs.ticks.values()
    parameters = len(jax.tree.leaves(engine.params))
    assert len(tick.input_shardings[0][0]) == parameters
    found = dispatch.measure(engine, 6, step_s=0.02)
    assert found["ticks"] >= 6 * dispatch.STEPS / 4 / 10
    assert all(value > 0 for value in found.values()), found
    assert found["instructions and program"] > found["instructions"]
    assert found["host, per tick"] > found["loop's thread"]
