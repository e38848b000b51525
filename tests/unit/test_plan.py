"""`sdtpu plan` without a compiler: chips, estimates, loads, the cache, the command's options and exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from sdtpu_worker.commands.plan import plan
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning import compile_ahead as compiling
from sdtpu_worker.planning import plan as planning
from sdtpu_worker.planning.chips import CHIPS, GIB, parse_topology
from sdtpu_worker.planning.compile_ahead import Limits, Wanted
from sdtpu_worker.planning.estimates import best, estimate, scale
from sdtpu_worker.planning.load import hosts_for_load
from sdtpu_worker.planning.results_cache import ResultsCache, fingerprint
from tests.support.paths import ROOT

V5E = CHIPS["v5e"]
WEIGHTS, MORE = 1_638_000_000, 819_000_000  # bytes: 2 ms and 1 ms of a v5e's bandwidth


def work(hbm_bytes: int, cycles: int = 0) -> dict:
    return {"hbm_bytes": hbm_bytes, "cycles": cycles, "kernels": 0, "loops_of_unknown_length": 0}


def facts(slots: int = 1, temp: int = GIB, cycles: int = 0) -> dict:
    """What a compile of a model says whose step reads its weights, and moves 1 ms of other bytes for each slot."""
    parts = {name: work(0) for name in ("tick", "phase", "insert", "decode", "picture")}
    parts["step"] = work(WEIGHTS + slots * MORE, cycles)
    program = {"code_bytes": None, "collectives": {}, "aliased": 12, "argument_bytes": 2 * GIB, "temp_bytes": temp}
    small = program | {"parts": {"all": work(0)}, "temp_bytes": 0, "total_bytes": 0}
    return {
        "num_devices": 8, "resolution": [512, 512], "rows_per_job": 2, "unet_bytes": WEIGHTS, "slot_bytes": 0,
        "bank_bytes": 0, "entry_bytes": 0, "donated": 12, "fits": True, "reason": None, "code_generated": False,
        "time_limit_passed": False,
        "matmuls": {"step": [[128, 128, 128, slots]], "insert": [], "decode": [[128, 128, 128, 7]], "picture": []},
        "programs": {"tick": program | {"parts": parts, "total_bytes": 2 * GIB + temp}, "snapshot": small},
    }  # fmt: skip


# Chips


def test_peaks_follow_from_clock_and_matrix_units():
    units = {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 4}
    for chip in CHIPS.values():
        assert 2 * units[chip.name] * chip.lanes**2 * chip.clock_hz == pytest.approx(chip.flops, rel=0.002)


@pytest.mark.parametrize(
    ("m", "k", "n", "padded"),
    [
        (4096, 320, 1280, 2 * 4096 * 384 * 1280),
        (4096, 40, 4096, 2 * 4096 * 128 * 4096),  # scores of heads of 40
        (40, 4096, 4096, 2 * 128 * 4096 * 4096),  # and their values: rows do not hide the loading of tiles
        (4096, 4096, 40, 2 * 128 * 4096 * 4096),
    ],
)
def test_a_matrix_unit_works_on_whole_tiles(m, k, n, padded):
    assert V5E.padded_flops(m, k, n) == padded


@pytest.mark.parametrize(
    ("text", "name", "chips"), [("v6e", "v6e:2x4", 8), ("v5e:2x2", "v5e:2x2", 4), ("v4", "v4:2x2x1", 4)]
)
def test_a_topology_is_a_chip_and_its_layout(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips) == (name, chips)


@pytest.mark.parametrize("text", ["v7", "", "v5e:", "v5e:2x4x1", "v4:2x2", "v5e:0x4", "v5e:4x4", "v5e:2x4 "])
def test_another_topology_is_refused(text):
    if text == "v5e:":
        assert parse_topology(text).name == "v5e:2x4"
        return
    with pytest.raises(ConfigurationError, match="--topology must"):
        parse_topology(text)


# Estimates


def test_a_step_takes_the_longest_of_its_limits():
    found = estimate(facts(2), 2, V5E)
    assert (found.step.limit, found.step.seconds) == ("HBM traffic", pytest.approx(4e-3))
    assert found.hbm_gb_per_image_step == pytest.approx((WEIGHTS + 2 * MORE) / 2e9)
    assert found.ms_per_image_step == pytest.approx(2)
    assert found.decode.limit == "padded FLOPs"
    slower = estimate(facts(2, cycles=9_000_000), 2, V5E)
    assert (slower.step.limit, slower.step.seconds) == ("cycles", pytest.approx(6e-3))


def test_latency_and_images_follow_from_the_step():
    found = estimate(facts(2), 2, V5E)
    decode_s = 7 * 2 * 128**3 / V5E.flops
    assert found.latency_s(20) == pytest.approx(20 * 4e-3 + decode_s)
    assert found.images_per_s(20) == pytest.approx(8 * 2 / (20 * 4e-3 + 2 * decode_s))


def test_other_slot_counts_read_the_weights_once():
    scaled = scale(facts(1), estimate(facts(1), 1, V5E), 4, V5E)
    compiled = estimate(facts(4), 4, V5E)
    assert (scaled.kind, compiled.kind) == ("arithmetic", "compiled")
    assert scaled.step == compiled.step
    assert scaled.total_bytes == 2 * GIB + 4 * GIB


def test_what_needs_more_memory_than_the_chip_has_does_not_fit():
    assert estimate(facts(1, temp=13 * GIB), 1, V5E).fits
    assert not estimate(facts(1, temp=14 * GIB), 1, V5E).fits
    assert estimate(facts(1, temp=14 * GIB), 1, CHIPS["v6e"]).fits


def test_the_best_setting_fits_and_has_no_slots_that_gain_nothing():
    one, four = (estimate(facts(slots), slots, V5E) for slots in (1, 4))
    assert best([one, four], 30) == four
    assert best([one, replace(four, fits=False)], 30) == one
    assert best([one, replace(four, slots=2, step=replace(four.step, seconds=2 * one.step.seconds))], 30) == one
    assert best([replace(one, fits=False)], 30) is None


# Loads


def test_hosts_and_money_for_a_load():
    setting = estimate(facts(4), 4, V5E)  # 32 slots, 6 ms a step: about 178 images of 30 steps a second
    limit = 3600 * setting.images_per_s(30)
    found = hosts_for_load(setting, 2.5 * limit, [30], 5.0, 8, 1.5)
    assert found["kind"] == "simulated"
    assert found["hosts"] == 3
    assert found["p99_s"] <= 5
    assert found["cost_per_hour"] == 3 * 8 * 1.5
    assert found["cost_per_1000_images"] == pytest.approx(1000 * 36 / (2.5 * limit), rel=1e-2)
    assert hosts_for_load(setting, limit / 2, [30], 5.0, 8, None)["cost_per_hour"] is None


def test_a_latency_that_no_host_reaches_is_refused():
    with pytest.raises(ConfigurationError, match="--p99 must be more than"):
        hosts_for_load(estimate(facts(4), 4, V5E), 100, [1000], 1.0, 8, None)


# The cache


def test_what_was_compiled_is_kept(tmp_path):
    cache = ResultsCache(tmp_path / "new")
    assert cache.read("a") is None
    cache.write("a", facts())
    assert cache.read("a") == facts()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "no object", "empty"])
def test_a_damaged_file_counts_as_none(tmp_path, damage):
    cache, file = ResultsCache(tmp_path), tmp_path / "a.json"
    cache.write("a", facts())
    text = file.read_text()
    file.write_text(
        {"cut": text[:-9], "changed": text.replace("512", "513"), "foreign": text.replace('"a"', '"b"', 1),
         "no object": "[1]", "empty": ""}[damage]
    )  # fmt: skip
    assert cache.read("a") is None


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ResultsCache(tmp_path / "file")
    cache.write("a", facts())
    assert cache.read("a") is None


def test_the_fingerprint_tells_settings_and_configs_apart(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    wanted = Wanted(str(tmp_path), "v5e:2x4", 4)
    keys = {fingerprint(wanted, False), fingerprint(wanted, True), fingerprint(replace(wanted, slots=2), False)}
    (tmp_path / "model_index.json").write_text('{"a": 1}')
    assert len({*keys, fingerprint(wanted, False)}) == 4


# The command


@pytest.fixture
def fake_compiler(monkeypatch):
    """Compiles in no time; `calls` has what was wanted, `facts` what it finds."""
    seen = type("Seen", (), {"calls": [], "facts": staticmethod(facts)})()

    def compile_ahead(wanted: Wanted, limits: Limits, say: object) -> dict:
        seen.calls.append((wanted, limits))
        return seen.facts(wanted.slots)

    monkeypatch.setattr(planning, "compile_ahead", compile_ahead)
    monkeypatch.setattr(planning, "check_installed", lambda: None)
    return seen


def run(*arguments: str, cache: object = None):
    kept = ["--no-cache"] if cache is None else ["--cache", str(cache)]
    return CliRunner().invoke(plan, ["--model", "sd15", *kept, *arguments])


def test_json_has_the_documented_names(fake_compiler):
    done = run("--json", "--load", "100", "--price", "1.2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["best_slots_per_device"] == 4
    assert [each["slots_per_device"] for each in found["settings"]] == [1, 2, 4, 8]
    assert [each["kind"] for each in found["settings"]] == ["arithmetic", "arithmetic", "compiled", "arithmetic"]
    compiled = found["settings"][2]
    assert compiled["hbm_gb_per_image_step"] == pytest.approx((WEIGHTS + 4 * MORE) / 4e9, abs=1e-4)
    assert compiled["estimated_ms_per_image_step"] == 1.5
    assert (compiled["estimate"], compiled["collectives"], compiled["aliased_buffers"]) == ("arithmetic", 0, 12)
    page = (ROOT / "docs" / "reference" / "plan.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert sorted({*found, *compiled, *compiled["memory"], *compiled["step"], *found["load"]} - named) == []


def test_a_core_that_counts_as_a_device_has_its_part_of_the_chip(fake_compiler):
    found = {}
    for devices in (4, 8):
        fake_compiler.facts = lambda slots, devices=devices: facts(slots) | {"num_devices": devices}
        done = run("--json", "--topology", "v4")
        found[devices] = json.loads(done.stdout)["settings"][2]
    assert found[8]["step"]["ms"] == pytest.approx(2 * found[4]["step"]["ms"], rel=1e-3)
    assert found[8]["image_steps_per_s"] == pytest.approx(found[4]["image_steps_per_s"], rel=1e-3)


def test_text_says_what_each_figure_is(fake_compiler):
    done = run("--load", "100", "--steps", "20,30")
    assert done.exit_code == 0, done.output
    for words in ("4 slots per device, compiled: fits", "arithmetic", "Load, simulated", "12 of 12", "nothing ran on"):
        assert words in done.stdout


def test_auto_compiles_every_count_and_the_cache_remembers(fake_compiler, tmp_path):
    assert run("--slots-per-device", "auto", cache=tmp_path).exit_code == 0
    assert [wanted.slots for wanted, _ in fake_compiler.calls] == [1, 2, 4, 8]
    again = run("--slots-per-device", "2,8", cache=tmp_path)
    assert again.exit_code == 0
    assert len(fake_compiler.calls) == 4
    assert "compiled before" in again.stderr
    assert run("--slots-per-device", "2", "--full", cache=tmp_path).exit_code == 0
    assert len(fake_compiler.calls) == 5


def test_options_reach_the_compiler(fake_compiler):
    run("--resolution", "768x512", "--guidance", "off", "--lora-rank", "16", "--topology", "v6e", "--time-limit", "9")
    ((wanted, limits),) = fake_compiler.calls
    assert wanted == Wanted("sd15", "v6e:2x4", 4, (768, 512), "off", 16)
    assert limits == Limits(False, 9.0, 12 * GIB)


def test_a_result_after_the_time_limit_is_not_kept(fake_compiler, tmp_path):
    fake_compiler.facts = lambda slots: facts(slots) | {"time_limit_passed": True}
    run(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_fits_nowhere_has_its_own_exit_code(fake_compiler):
    no_room = {"fits": False, "reason": "RESOURCE_EXHAUSTED: 18 GiB of 15.75 GiB"}
    fake_compiler.facts = lambda slots: facts(slots) | no_room
    done = run()
    assert done.exit_code == 5
    assert "DOES NOT FIT: RESOURCE_EXHAUSTED" in done.stdout
    fake_compiler.facts = lambda slots: facts(slots) | no_room | {"programs": {}}
    done = run("--load", "100", "--json")
    assert done.exit_code == 5
    assert json.loads(done.stdout)["settings"][0]["reason"] == no_room["reason"]
    assert run().exit_code == 5


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--topology", "v9"], "--topology must begin with one of v4, v5e", 1),
        (["--slots-per-device", "0"], "must be auto, or numbers from 1 to 64", 2),
        (["--slots-per-device", "65"], "must be auto, or numbers from 1 to 64", 2),
        (["--resolution", "wide"], "must be one number of pixels, or height x width", 2),
        (["--resolution", "0"], "must be one number of pixels, or height x width", 2),
        (["--steps", "0"], "must be numbers from 1 to 1000", 2),
        (["--guidance", "some"], "is not one of", 2),
        (["--load", "0"], "0.0", 2),
    ],
)
def test_a_wrong_option_is_one_line(fake_compiler, arguments, words, code):
    done = run(*arguments)
    assert (done.exit_code, fake_compiler.calls) == (code, [])
    assert words in done.stderr


def test_a_missing_package_names_the_extra(monkeypatch):
    found = compiling.importlib.util.find_spec
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    done = run()
    assert done.exit_code == 1
    assert "libtpu" in done.stderr
    assert "pip install 'sdtpu_worker[plan]'" in done.stderr


def test_a_library_in_use_is_said():
    with pytest.raises(compiling.PlanFailed, match="in use by another process"):
        compiling._check_exit(5, "The TPU is already in use by process with pid 7", Wanted("sd15", "v5e:2x4", 4))
