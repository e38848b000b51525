"""`sdtpu plan` without a compiler: the cache, the command's options and exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from sdtpu_worker.commands import plan as commands
from sdtpu_worker.commands.plan import plan
from sdtpu_worker.planning import compile_ahead as compiling
from sdtpu_worker.planning import plan as planning
from sdtpu_worker.planning.chips import GIB
from sdtpu_worker.planning.compile_ahead import Limits, Wanted
from sdtpu_worker.planning.results_cache import ResultsCache, fingerprint
from tests.support.paths import ROOT
from tests.support.plan_facts import MORE, WEIGHTS, facts

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
    monkeypatch.delenv("SDTPU_VAE_TILING", raising=False)
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
    assert "\n1 slot per device, compiled: fits\n" in run("--slots-per-device", "1").stdout
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


def test_options_reach_the_compiler(fake_compiler, tmp_path):
    options = ["--resolution", "768x512", "--guidance", "off", "--lora-rank", "16", "--topology", "v6e",
               "--time-limit", "9", "--prompt-windows", "2", "--no-image-inputs", "--previews", "--vae-tiling", "on",
               "--attention", "plain", "--dtype", "float32", "--controlnets", f"b={tmp_path},a=owner/a"]  # fmt: skip
    run(*options)
    ((wanted, limits),) = fake_compiler.calls
    controlnets = ("a", ""), ("b", str(tmp_path))
    assert wanted == Wanted(
        "sd15", "v6e:2x4", 4, (768, 512), "off", 16, False, 2, controlnets, True, "plain", "on", "float32"
    )
    assert limits == Limits(False, 9.0, 12 * GIB)


def test_code_generation_has_an_hour_since_a_busy_machine_needs_it(fake_compiler):
    run("--slots-per-device", "2")
    run("--slots-per-device", "2", "--full")
    assert [limits.time_s for _, limits in fake_compiler.calls] == [900, 3600]


def test_without_options_a_plan_is_for_a_worker_with_the_default_settings(fake_compiler):
    from sdtpu_worker.settings_table import SETTINGS

    done = run("--json")
    ((wanted, _),) = fake_compiler.calls
    default = {setting.name: setting.default for setting in SETTINGS}
    for name in ("guidance", "image_inputs", "prompt_windows", "attention", "vae_tiling"):
        assert getattr(wanted, name) == default[f"sdtpu_{name}"], name
    assert (wanted.lora_rank, wanted.controlnets, wanted.previews, wanted.dtype) == (0, (), False, "bfloat16")
    planned = json.loads(done.stdout)["planned_for"]
    assert {name: source for name, source in planned["sources"].items() if source != "default"} == {"model": "--model"}


def test_a_plan_takes_the_workers_settings_and_says_whose_they_are(fake_compiler, monkeypatch, tmp_path):
    conf = {"sdtpu_model": "sdxl", "sdtpu_resolutions": [(1024, 1024), (1216, 832), (768, 768)],
            "sdtpu_dtype": "float32", "sdtpu_loras": str(tmp_path), "sdtpu_preview_every": 5,
            "sdtpu_controlnets": {"pose": "owner/pose"}, "sdtpu_slots_per_device": 2,
            "sdtpu_prompt_windows": 5}  # fmt: skip
    monkeypatch.setattr(commands, "find_app", lambda path: type("App", (), {"conf": conf if path == "shop" else {}}))
    monkeypatch.setenv("SDTPU_PROMPT_WINDOWS", "1")
    done = CliRunner().invoke(plan, ["--app", "shop", "--no-cache", "--lora-rank", "8", "--json"])
    assert done.exit_code == 0, done.output
    ((wanted, _),) = fake_compiler.calls
    assert (wanted.model, wanted.slots, wanted.resolution) == ("sdxl", 2, (1024, 1024))
    assert (wanted.prompt_windows, wanted.lora_rank, wanted.previews, wanted.dtype) == (1, 8, True, "float32")
    assert wanted.controlnets == (("pose", ""),)
    planned = json.loads(done.stdout)["planned_for"]
    assert planned["controlnets"] == {"pose": "usual"}
    assert planned["other_resolutions"] == [[1216, 832], [768, 768]]
    sources = {name: planned["sources"][name] for name in ("model", "prompt_windows", "lora_rank", "guidance")}
    assert sources == {
        "model": "the app's configuration", "prompt_windows": "SDTPU_PROMPT_WINDOWS", "lora_rank": "--lora-rank",
        "guidance": "default",
    }  # fmt: skip
    text = CliRunner().invoke(plan, ["--app", "shop", "--no-cache"]).stdout
    assert "prompts of one window (SDTPU_PROMPT_WINDOWS); pictures as input; 1 ControlNet (pose: usual)" in text
    assert "LoRAs of jobs up to rank 16 (the app's configuration); previews (the app's configuration)" in text
    assert "slots and programs of 1216x832, 768x768 come on top" in text


def test_slots_of_the_app_may_be_auto(fake_compiler, monkeypatch):
    monkeypatch.setenv("SDTPU_SLOTS_PER_DEVICE", "auto")
    assert run().exit_code == 0
    assert [wanted.slots for wanted, _ in fake_compiler.calls] == [1, 2, 4, 8]


@pytest.mark.parametrize("arguments", [[], ["--model", ""], ["--model", " "]])
def test_a_plan_without_a_model_asks_for_one(fake_compiler, arguments):
    done = CliRunner().invoke(plan, ["--no-cache", *arguments])
    assert (done.exit_code, fake_compiler.calls) == (1, [])
    assert "--model must name a model, as in --model sd15" in done.stderr


def test_a_result_after_the_time_limit_is_not_kept(fake_compiler, tmp_path):
    fake_compiler.facts = lambda slots: facts(slots) | {"time_limit_passed": True}
    done = run("--time-limit", "90", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "the 90 s of --time-limit passed" in done.stderr


def test_what_does_not_fit_is_planned_in_tiles_as_the_worker_does_it(fake_compiler, monkeypatch):
    def compile_ahead(wanted, limits, say):
        fake_compiler.calls.append(wanted.vae_tiling)
        in_tiles = wanted.vae_tiling == "on"
        return facts(wanted.slots, temp=GIB if in_tiles else 14 * GIB) | {"in_tiles": in_tiles}

    monkeypatch.setattr(planning, "compile_ahead", compile_ahead)
    done = run("--json")
    assert (done.exit_code, fake_compiler.calls) == (0, ["auto", "on"])
    assert "does not fit; once more with images decoded in tiles" in done.stderr
    assert [each["in_tiles"] for each in json.loads(done.stdout)["settings"]] == [None, None, True, None]
    assert "4 slots per device, compiled: fits, with images decoded in tiles" in run().stdout
    fake_compiler.calls.clear()
    assert run("--vae-tiling", "off").exit_code == 5
    assert fake_compiler.calls == ["off"]


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
        (["--load", "nan"], "must be a finite number, got nan", 2),
        (["--load", "9", "--price", "inf"], "must be a finite number, got inf", 2),
        (["--memory-limit", "nan"], "must be a finite number, got nan", 2),
        (["--price", "1.2"], "--price is for --load", 2),
        (["--topology", "v5e:8x1"], "--topology must be a host of v5e or a part of one, whose chips lie 2x4", 1),
        (["--topology", "v5e:1x3"], "such as v5e:2x4 or v5e:1x1, got 'v5e:1x3'", 1),
        (["--prompt-windows", "0"], "1<=x<=16", 2),
        (["--controlnets", "9"], "an integer from 0 to 8", 2),
        (["--controlnets", "pose"], "names with sources", 2),
        (["--controlnets", "pose=/no/such/folder"], "pose must be a folder with a ControlNet's config.json", 2),
        (["--attention", "cudnn"], "is not one of", 2),
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
