"""`benchmarks/accelerator.py`: what fits into its minutes, what a cut run leaves, a part on simulated devices."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, accelerator_checkpoint
from benchmarks.accelerator_figures import Report, peak_flops, repeat
from benchmarks.accelerator_table import to_text
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import Folder, find_folder
from tests.support.paths import ROOT, XLA_CACHE

ABOUT = {
    "platform": "cpu", "device_kind": "cpu", "num_devices": 8, "versions": {"jax": "0"}, "runtime": "",
    "memory_bytes": {},
}  # fmt: skip
STUBS = {
    "engine": """
report.add("load the checkpoint", [2.0], "s")
report.add("a step of one image", [3.0, 1.0, 2.0], "ms of a device", gflop=5.0, share_of_peak=None, peak_flops=None)
""",
    "diffusers": """
report.add("a step of one image", [6.0], "ms of a device", way="eager")
report.add("a step of one image", [4.0], "ms of a device", way="compiled")
import time
time.sleep(60)
""",
    "worker": """
raise RuntimeError('no redis-server on the PATH')
""",
}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Parts that measure in no time, one of them too slow, one of them broken."""
    for kind, code in STUBS.items():
        file = tmp_path / "benchmarks" / f"accelerator_{kind}.py"
        file.parent.mkdir(exist_ok=True)
        lines = ["import sys", "from pathlib import Path", "from benchmarks.accelerator_figures import Report"]
        lines.append("report = Report(Path(sys.argv[sys.argv.index('--out') + 1]))")
        file.write_text("\n".join(lines) + code)
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(accelerator, "_env", lambda: {"PYTHONPATH": str(ROOT)})
    monkeypatch.setattr(accelerator, "probe", lambda platform: ABOUT)
    monkeypatch.setattr(accelerator, "has_torch", lambda python: True)
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    return tmp_path


def test_a_cut_part_and_a_broken_one_leave_what_was_measured(stubs, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_LEAST_S", 1.0)
    monkeypatch.setattr(accelerator, "_SPARE_S", 1.0)
    out = stubs / "out.json"
    arguments = ["--minutes", "0.5", "--slots", "4", "--out", str(out), "--scratch", str(stubs)]
    assert accelerator.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["about"]["rehearsal"]
    engine, diffusers, worker = found["parts"]
    assert (engine["status"], diffusers["status"], worker["status"]) == ("done", "ended", "failed")
    assert worker["reason"] == "RuntimeError: no redis-server on the PATH"
    step = engine["figures"][1]
    assert (step["median"], step["low"], step["high"], step["n"], step["unit"]) == (2, 1, 3, 3, "ms of a device")
    said = capsys.readouterr().out
    assert said.count("A REHEARSAL. There is no accelerator here") == 3
    assert "4 slots, a step of one image           2  diffusers         4 (compiled)  2.00 times" in said
    assert sorted(path.name for path in stubs.iterdir()) == ["benchmarks", "out.json"]


def test_the_most_important_parts_come_first_and_what_does_not_fit_is_left_out():
    args = accelerator._parse(["--slots", "4,1"])
    names = [part.name for part in accelerator.parts(args, True, False)]
    assert names == [
        "engine, 4 slots",
        "diffusers, 4 slots",
        "worker, 4 slots",
        "engine, 1 slot",
        "diffusers, 1 slot",
    ]
    assert not any(part.kind == "diffusers" for part in accelerator.parts(args, False, False))
    (again,) = [part for part in accelerator.parts(args, False, False) if part.name == "engine, 1 slot"]
    before: list[dict[str, Any]] = [
        {"kind": "engine", "slots": 4, "figures": [{"median": 200.0, "unit": "s"}, {"median": 9.0, "unit": "ms"}]}
    ]
    assert accelerator.why_not(again, before, 240) == ""
    assert accelerator.why_not(again, before, 200) == "needs about 220 s, and 200 s are left"
    no_room = {"kind": "engine", "slots": 4, "figures": [], "reason": "RESOURCE_EXHAUSTED (out of memory)"}
    larger = accelerator.Part("engine", 8, 0.3)
    assert accelerator.why_not(larger, [no_room], 500) == "4 slots had no room"
    assert accelerator.why_not(again, [no_room], 500) == ""


def test_a_share_of_the_peak_is_said_only_of_known_devices():
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5 lite", "float32") is None
    assert peak_flops("NVIDIA GeForce of the future", "bfloat16") is None


def test_runs_end_with_the_time(tmp_path):
    assert repeat(lambda: 1.0, 5, time.monotonic() + 60) == [1.0] * 5
    assert repeat(lambda: 1.0, 5, time.monotonic() - 1) == [1.0]
    report = Report(tmp_path / "out.json", slots=2)
    report.add("a figure", [1.23456789], "s")
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "slots": 2,
        "figures": [{"name": "a figure", "median": 1.2346, "low": 1.2346, "high": 1.2346, "n": 1, "unit": "s"}],
    }


def test_the_table_says_what_was_left_out():
    part = {"name": "engine, 8 slots", "kind": "engine", "slots": 8, "status": "left out", "reason": "no time"}
    about = {**ABOUT, "rehearsal": False, "model": "sd15", "date": "", "python": ""}
    text = to_text({"about": about, "parts": [{**part, "figures": []}]})
    assert "engine, 8 slots: left out: no time" in text
    assert "REHEARSAL" not in text


def test_random_weights_are_a_checkpoint_that_loads(monkeypatch, tmp_path):
    shipped = Folder(find_folder("embedded", "main"))
    monkeypatch.setattr(accelerator_checkpoint, "KnownModel", lambda name: shipped)
    monkeypatch.setattr(accelerator_checkpoint, "read_abstract", lambda name, dtype: load_checkpoint("embedded", dtype))
    accelerator_checkpoint.write_checkpoint("a model", tmp_path / "random")
    found, wanted = load_checkpoint(str(tmp_path / "random"), jnp.bfloat16), load_checkpoint("embedded", jnp.bfloat16)
    for part, leaves in wanted.params.items():
        assert {name: leaf.shape for name, leaf in leaves.items()} == {
            name: leaf.shape for name, leaf in found.params[part].items()
        }
    weights = np.asarray(found.params["unet"]["conv_in.weight"], np.float32)
    assert 0.5 < weights.std() * np.sqrt(np.prod(weights.shape[:-1])) < 2


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--model", "owner/name"], ["--slots", "0"]])
def test_a_wrong_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        accelerator.main(arguments)
    assert f"{arguments[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_engines_part_measures_on_simulated_devices(tmp_path):
    out = tmp_path / "engine.json"
    script = str(ROOT / "benchmarks" / "accelerator_engine.py")
    command = [sys.executable, script, "--model", "embedded", "--slots", "1", "--platform",
               "cpu", "--steps", "2", "--seconds", "1", "--loop", "--out", str(out),
               "--compile-cache", str(XLA_CACHE)]  # fmt: skip
    run = subprocess.run(command, env=accelerator._env(), capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert (found["num_devices"], found["slots_per_device"]) == (8, 1)
    figures = {(figure["name"], tuple(figure.get("steps", ()))): figure for figure in found["figures"]}
    for name in ("compile the programs", "a step of one image", "a decode", "the host's work to dispatch a tick"):
        assert figures[name, ()]["median"] > 0, name
    assert 0 < figures["occupancy", (2,)]["median"] <= 1
    assert figures["images", (10, 20, 30, 50)]["median"] > 0
