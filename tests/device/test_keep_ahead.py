"""Programs that `sdtpu compile` makes: a start finds them, and those for a TPU are what a TPU host looks for."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdtpu_worker.diffusion.checkpoint import LoadOptions, open_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.compilation import kept_programs_of
from sdtpu_worker.diffusion.kept_programs import _MAGIC, KeptPrograms, is_whole
from sdtpu_worker.diffusion.program_setting import shapes_on_mesh
from sdtpu_worker.diffusion.sharding import make_mesh

LIMIT_S = 280
PLAIN = {"SDTPU_SLOTS_PER_DEVICE": "1"}

TPU_HOST = """
import sys
from jax.experimental import topologies
import jax.numpy as jnp
from sdtpu_worker.config import read_config
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import open_checkpoint
from sdtpu_worker.diffusion.compilation import kept_programs_of
from sdtpu_worker.diffusion.program_setting import Setting, geometries_of, shapes_on_mesh
from sdtpu_worker.diffusion.sharding import make_mesh
from sdtpu_worker.diffusion.start import load_options, programs_folder

config = read_config({})
described = topologies.get_topology_desc("v5e:1x1", platform="tpu", chips_per_host_bounds=[1, 1, 1]).devices
with CompileCache(sys.argv[1], ahead=programs_folder(config)) as cache:
    checkpoint, _ = open_checkpoint(config.model, jnp.bfloat16, load_options(config))
    mesh = make_mesh(list(described))
    keep = kept_programs_of(checkpoint, shapes_on_mesh(checkpoint, mesh)[0], mesh, cache.programs, cache.ahead)
    (geometry,) = geometries_of(checkpoint, Setting(1), mesh, False).values()
    print(keep.fingerprint)
    for kind in ("tick", "snapshot", "restore"):
        print(keep.find(kind, (64, 64), geometry))
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SDTPU_", "XLA_", "JAX_"))}
    return {**inherited, "SDTPU_PROGRAMS": str(folder), **more}


def compile_ahead(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "compile", "--json", *options]
    return subprocess.run(
        command, env=environment(folder, **settings), capture_output=True, text=True, timeout=LIMIT_S, cwd=folder.parent
    )


class Reader(pickle.Unpickler):
    """Reads a serialised program without a device that could load it."""

    def __init__(self, data: bytes, devices: list[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self.devices, self.code, self.ids = devices, b"", set[int]()

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "exec":
            self.code = pid[1]
        if pid[0] == "device":
            self.ids.add(pid[1])
            return self.devices[pid[1]]
        return self.devices[0].client if pid[0] == "client" else None


@pytest.mark.timeout(LIMIT_S + 20)
def test_programs_for_a_tpu_are_whole_and_are_those_that_a_tpu_host_looks_for(tmp_path, devices):
    folder = tmp_path / "programs"
    made = compile_ahead(folder, "--topology", "v5e:1x1", **PLAIN)
    assert made.returncode == 0, made.stderr
    assert "compiling the program tick of 64x64" in made.stderr or "MiB" in made.stderr
    found = json.loads(made.stdout)
    assert (found["device_kind"], found["num_devices"], found["topology"]) == ("TPU v5 lite", 1, "v5e:1x1")
    files = {each["program"]: Path(each["file"]) for each in found["programs"]}
    facts = folder / f"facts-{found['fingerprint']}.json"
    assert {*files.values(), facts} == set(folder.iterdir())
    for each in found["programs"]:
        path = Path(each["file"])
        assert (each["bytes"], each["was_there"]) == (path.stat().st_size, False)
        assert path.stat().st_mode & 0o022 == 0
        assert is_whole(path)
        serialized, in_tree, _ = pickle.loads(path.read_bytes()[len(_MAGIC) + 32 :])
        reader = Reader(serialized, devices)
        _, arguments, _ = reader.load()
        assert reader.ids == {0}
        assert len(reader.code) > 10_000
        assert in_tree.num_leaves == len(arguments)

    # JAX sets these by itself on a machine that has a TPU; the rest of such a process is as here.
    host = {"JAX_FORCE_TPU_INIT": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "SDTPU_PLATFORM": "tpu"}  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", TPU_HOST, str(tmp_path / "cache")],
        env=environment(folder, **PLAIN, **host), capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-4:] == [
        found["fingerprint"],
        *(str(files[kind]) for kind in ("tick", "snapshot", "restore")),
    ]


def fingerprint(folder: Path, mesh: Any, **options: Any) -> KeptPrograms:
    checkpoint, _ = open_checkpoint(str(folder), jnp.float32, LoadOptions(**options))
    return kept_programs_of(checkpoint, shapes_on_mesh(checkpoint, mesh)[0], mesh, None, folder.parent / "ahead")


def test_programs_are_those_of_the_configs_wherever_they_lie_and_without_weights(tmp_path, devices):
    mesh = make_mesh(devices[:1])
    whole = find_folder("embedded", "main")
    copy = shutil.copytree(whole, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.msgpack", "*.safetensors"))
    assert len(list(copy.rglob("*"))) < len(list(whole.rglob("*")))
    one, other = fingerprint(whole, mesh), fingerprint(copy, mesh)
    assert one.fingerprint == other.fingerprint
    assert fingerprint(copy, mesh, guidance="off").fingerprint != one.fingerprint


def test_a_worker_says_what_programs_made_ahead_were_made_for(tmp_path, devices, monkeypatch):
    mesh = make_mesh(devices[:1])
    copy = shutil.copytree(find_folder("embedded", "main"), tmp_path / "model")
    ahead = tmp_path / "ahead"
    assert fingerprint(copy, mesh).missing() == f"sdtpu_programs: {ahead} has no programs"
    checkpoint, _ = open_checkpoint(str(copy), jnp.float32)
    made = kept_programs_of(checkpoint, shapes_on_mesh(checkpoint, mesh)[0], mesh, ahead)
    assert made.missing() is None
    made.write_facts()
    (ahead / "facts-0.json").write_text("{")
    about = f"sdtpu_programs: the programs in {ahead} were made for another"
    assert fingerprint(copy, mesh).missing() == (
        f"{about} sdtpu_slots_per_device, sdtpu_resolutions, previews, tiling or attention"
    )
    assert fingerprint(copy, mesh, image_inputs=False).missing() == f"{about} parameters"
    monkeypatch.setenv("XLA_FLAGS", "--another")
    assert fingerprint(copy, mesh).missing() == f"{about} variables"


@pytest.mark.parametrize(
    ("options", "settings", "line"),
    [
        ([], {"SDTPU_SLOTS_PER_DEVICE": "auto", "SDTPU_PLATFORM": "cpu"}, "sdtpu_slots_per_device must be a number"),
        ([], {"SDTPU_PROGRAMS": "", "SDTPU_COMPILE_CACHE": "off", "SDTPU_PLATFORM": "cpu"}, "must name the folder"),
        (["--topology", "v5e:2x4"], {"SDTPU_PLATFORM": "cpu"}, "sdtpu_platform must be auto or tpu"),
        (["--topology", "v9"], {}, "--topology must begin with one of"),
        ([], {"SDTPU_MODEL": "/nowhere", "SDTPU_PLATFORM": "cpu"}, "there is no folder '/nowhere'"),
        ([], {"SDTPU_DTYPE": "int3"}, "SDTPU_DTYPE must be"),
    ],
    ids=["slots", "no folder", "platform", "chip", "model", "setting"],
)
def test_what_cannot_be_compiled_ahead_is_refused_with_a_line(tmp_path, options, settings, line):
    run = compile_ahead(tmp_path / "programs", *options, **settings)
    assert run.returncode == 1, run.stderr
    assert line in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "programs").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "programs").write_text("a file, not a folder")
    run = compile_ahead(tmp_path / "programs", SDTPU_PLATFORM="cpu", SDTPU_CPU_DEVICES="1")
    assert run.returncode == 1
    assert "programs" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert jax.device_count() > 1, "this process keeps its devices"
