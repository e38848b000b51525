"""What work costs is measured once for programs that are kept; a file that is damaged or foreign is not believed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.diffusion import calibration, start
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.saved_costs import SavedCosts

LANE = 64, 64
COSTS = {LANE: TickCosts(2, Cost(0.5, 0.25, control_s=(0.125,)), {2: 1.5}, 0.01)}


@pytest.fixture
def saved(shipped, devices, tmp_path) -> SavedCosts:
    return SavedCosts(tmp_path, {LANE: "a fingerprint"}, shipped.family, devices[:2])


def test_costs_come_back_as_they_were_measured(saved):
    assert saved.load() is None
    saved.save(COSTS)
    found = saved.load()
    assert found is not None
    assert found[LANE].to_json() == COSTS[LANE].to_json()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("{", "JSONDecodeError"),
        ('{"64x64": {}}', "KeyError"),
        (json.dumps({"64x64": {**COSTS[LANE].to_json(), "step_s": float("nan")}}), "is none that was measured"),
        (json.dumps({"64x64": {**COSTS[LANE].to_json(), "step_s": 0.0}}), "is none that was measured"),
        (json.dumps({"64x64": {**COSTS[LANE].to_json(), "slowdown": [1.0]}}), "is none that was measured"),
        (json.dumps({"64x64": {**COSTS[LANE].to_json(), "decode_s": "1"}}), "TypeError"),
    ],
    ids=["half", "nothing", "not a number", "nothing costs", "another number of devices", "a text"],
)
def test_a_damaged_file_is_measured_again_with_a_line(saved, tmp_path, caplog, damage, line):
    saved.save(COSTS)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert saved.load() is None
    assert line in caplog.text


def test_what_costs_depend_on_names_their_file(shipped, devices, tmp_path):
    for fingerprint, number in (("one", 1), ("one", 2), ("another", 2)):
        SavedCosts(tmp_path, {LANE: fingerprint}, shipped.family, devices[:number]).save(COSTS)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_a_line(shipped, devices, caplog):
    SavedCosts(Path("/proc/none"), {LANE: "one"}, shipped.family, devices[:1]).save(COSTS)
    assert "could not be saved" in caplog.text


@pytest.mark.timeout(200)
def test_a_start_with_kept_programs_measures_nothing_and_draws_the_reference_image(
    shipped, devices, compile_cache, tmp_path, monkeypatch
):
    measured = []

    def measure(engine: object, lane: tuple[int, int]) -> TickCosts:
        measured.append(lane)
        return TickCosts(1, Cost(0.125))

    monkeypatch.setattr(calibration, "_measure_costs", measure)
    try:
        with CompileCache(str(tmp_path)) as cache:
            reset_cache()
            first, second = (start.make_warm_engine(shipped, devices[:1], compile_cache=cache) for _ in range(2))
    finally:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache.path))
        reset_cache()
    assert measured == [LANE]
    assert second.info.kept_programs == 3
    assert second.costs[LANE].to_json() == first.costs[LANE].to_json()
    assert second.calibration.reference_images[LANE].tobytes() == first.calibration.reference_images[LANE].tobytes()
