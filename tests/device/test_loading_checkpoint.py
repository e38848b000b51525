"""Weights are read while programs are compiled: whichever side fails, its error is raised and the other side ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion import engine as engines
from sdtpu_worker.diffusion.background import Background, Cancelled
from sdtpu_worker.diffusion.checkpoint import Checkpoint, open_checkpoint
from sdtpu_worker.diffusion.compilation import compile_programs
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.loading_checkpoint import LoadingCheckpoint
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.program_setting import Setting, geometries_of, shapes_on_mesh
from sdtpu_worker.diffusion.sharding import make_mesh
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint

REQUEST = GenerationRequest("a red circle", seed=3, num_inference_steps=2)


@pytest.fixture
def outline() -> Checkpoint:
    return open_checkpoint("embedded")[0]


def test_shapes_that_configs_give_are_those_of_the_weights(outline, shipped):
    assert outline.family.facts() == shipped.family.facts()
    given = jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), outline.params)
    assert given == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shipped.params)


def test_programs_are_there_before_the_weights_are_read(outline, shipped, devices, compile_cache):
    may_read = threading.Event()
    phases: list[str] = []

    def read(go_on: Callable[[], None]) -> Checkpoint:
        assert may_read.wait(100)
        return shipped

    def on_phase(phase: str) -> None:
        phases.append(phase)
        if phase == "waiting for the weights":
            may_read.set()

    with LoadingCheckpoint(outline, read) as loading:
        engine = Engine(loading, devices[:1], 1, None, compile_cache, on_phase=on_phase)
    assert phases == ["loading or compiling programs for 1 slots per device", "waiting for the weights"]
    whole = Engine(shipped, devices[:1], 1, None, compile_cache)
    assert engine.fingerprints == whole.fingerprints
    (image,), (same,) = (generate(each, [each.prepare("a", REQUEST)]) for each in (engine, whole))
    np.testing.assert_array_equal(image.pixels, same.pixels)


def test_weights_that_cannot_be_read_end_the_compiling(outline, devices, monkeypatch):
    def read(go_on: Callable[[], None]) -> Checkpoint:
        raise InvalidCheckpoint("NaN in conv_in.weight")

    def compile_setting(*given: object) -> None:
        check = given[-1]
        assert callable(check)
        for _ in range(1000):
            check()
            time.sleep(0.01)
        raise AssertionError("it compiles for ever")

    monkeypatch.setattr(engines, "compile_setting", compile_setting)
    with (
        LoadingCheckpoint(outline, read) as loading,
        pytest.raises(InvalidCheckpoint, match="NaN in conv_in"),
    ):
        Engine(loading, devices[:1])


def test_an_error_is_raised_while_a_program_is_still_being_compiled(outline, devices, monkeypatch):
    mesh, compiling, may_end = make_mesh(devices[:1]), threading.Event(), threading.Event()

    def compile_slowly(program: object) -> object:
        compiling.set()
        assert may_end.wait(100)
        return program

    def check() -> None:
        if compiling.is_set():
            raise InvalidCheckpoint("NaN in conv_in.weight")

    monkeypatch.setattr("sdtpu_worker.diffusion.compilation.compile_one", compile_slowly)
    monkeypatch.setattr("sdtpu_worker.diffusion.compilation.trace_one", lambda lower, checkpoint: lower)
    geometries = geometries_of(outline, Setting(), mesh, False)
    try:
        with pytest.raises(InvalidCheckpoint, match="NaN in conv_in"):
            compile_programs(outline, *shapes_on_mesh(outline, mesh), geometries, mesh, False, None, None, check)
    finally:
        may_end.set()


def test_programs_that_do_not_fit_end_the_reading(outline, devices, monkeypatch):
    ended = threading.Event()

    def read(go_on: Callable[[], None]) -> Checkpoint:
        try:
            while True:
                go_on()
                time.sleep(0.01)
        finally:
            ended.set()

    def compile_setting(*_: object) -> None:
        raise ConfigurationError("the model does not fit")

    monkeypatch.setattr(engines, "compile_setting", compile_setting)
    with (
        pytest.raises(ConfigurationError, match="does not fit"),
        LoadingCheckpoint(outline, read) as loading,
    ):
        Engine(loading, devices[:1])
    assert ended.is_set()
    with pytest.raises(Cancelled):
        loading.wait()


def test_reading_ends_between_two_tensors():
    outline, read = open_checkpoint("embedded")
    seen = []

    def go_on() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        read(go_on)
    assert len(seen) == 3 < len(jax.tree.leaves(outline.params))


def test_a_value_of_a_thread_is_waited_for_and_its_error_raised():
    assert Background(lambda go_on: 7, name="seven").result() == 7

    def fail(go_on: Callable[[], None]) -> int:
        raise KeyError("seven")

    failing = Background(fail, name="fails")
    for _ in range(2):
        with pytest.raises(KeyError, match="seven"):
            failing.result()
    with pytest.raises(KeyError, match="seven"):
        failing.check()


def test_a_checkpoint_that_is_read_waits_for_nothing(shipped):
    assert shipped.outline is shipped.wait() is shipped
    shipped.check()
    assert replace(shipped, name="another").outline.name == "another"
