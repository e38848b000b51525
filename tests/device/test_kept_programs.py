"""Programs that are kept whole: a later start loads them, traces nothing, and draws the same pixels bit for bit."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion import kept_programs, program_setting, start
from sdtpu_worker.diffusion.cache import CompileCache, TraceCounter
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.kept_programs import KeptPrograms, delete_all, facts_of
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.program_setting import Setting
from sdtpu_worker.diffusion.sharding import SHARDED, make_mesh, put

NAME = "tick", (64, 64), None
REQUEST = GenerationRequest("a red circle", seed=3, num_inference_steps=4)


@pytest.fixture
def mesh(devices):
    """Give two devices."""
    return make_mesh(devices[:2])


@pytest.fixture
def keep(tmp_path, mesh):
    """Give an empty folder of programs."""
    return KeptPrograms(tmp_path / "programs", {"made": "for a test"}, mesh)


@pytest.fixture
def cache(compile_cache, tmp_path):
    """Give an empty cache, so that programs are really compiled; other tests have theirs back."""
    with CompileCache(str(tmp_path)) as cache:
        reset_cache()
        yield cache
    jax.config.update("jax_compilation_cache_dir", str(compile_cache.path))
    reset_cache()


@pytest.fixture
def program(mesh, cache):
    """Give a compiled program that adds one."""
    sharding = NamedSharding(mesh, SHARDED)
    return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32, sharding=sharding)).compile()


@pytest.fixture
def kept(keep, program, tmp_path):
    """Give the file of a program that was kept."""
    keep.save(*NAME, program)
    (file,) = (tmp_path / "programs").iterdir()
    return file


def test_a_second_start_traces_and_compiles_nothing_and_draws_the_same_pixels(shipped, devices, cache):
    def start() -> tuple[Engine, int]:
        traces = TraceCounter()
        try:
            return Engine(shipped, devices[:1], 1, None, cache), traces.count()
        finally:
            traces.close()

    def draw(engine: Engine) -> np.ndarray:
        (image,) = generate(engine, [engine.prepare("a", REQUEST)])
        return image.pixels

    first, traces = start()
    assert traces > 0
    assert (first.info.kept_programs, len(list(cache.programs.iterdir()))) == (0, 3)
    second, traces = start()
    assert (second.info.kept_programs, traces) == (3, 0)
    assert (second.info.cache_hits, second.info.cache_misses) == (0, 0)
    assert second.fingerprints == first.fingerprints
    np.testing.assert_array_equal(draw(second), draw(first))
    delete_all(cache.programs)
    third, traces = start()
    assert (third.info.kept_programs, third.info.cache_hits, third.info.cache_misses) == (0, 3, 0)
    assert list(cache.programs.iterdir()) == [], "a copy of a copy may lack functions"


def test_kept_programs_that_do_not_run_are_compiled_again(monkeypatch, tmp_path, caplog):
    made, errors = [], [RuntimeError("NOT_FOUND: Function wrapped_broadcast not found")]
    (tmp_path / "tick.program").touch()

    def make(*_: object) -> Any:
        made.append(Mock(info=SimpleNamespace(kept_programs=len(list(tmp_path.iterdir())))))
        return made[-1]

    def calibrate(engine: Any, known: None) -> str:
        if errors:
            raise errors.pop()
        return "calibrated"

    monkeypatch.setattr(start, "Engine", make)
    monkeypatch.setattr(start, "calibrate", calibrate)
    engine: Any = start.make_warm_engine(Mock(), [], compile_cache=Mock(path=None, programs=tmp_path, ahead=None))
    assert [each.info.kept_programs for each in made] == [1, 0]
    made[0].close.assert_called_once_with()
    engine.adopt.assert_called_once_with("calibrated")
    assert "do not run, and are compiled again: NOT_FOUND" in caplog.text
    errors.append(RuntimeError("a program that was compiled here fails"))
    with pytest.raises(RuntimeError, match="was compiled here"):
        start.make_warm_engine(Mock(), [], compile_cache=Mock(path=None, programs=tmp_path, ahead=None))


def test_a_kept_program_runs(keep, kept, mesh):
    program = keep.load(*NAME)
    np.testing.assert_array_equal(program(put(np.array([1, 2], np.float32), mesh, SHARDED)), [2, 3])
    assert keep.load("snapshot", *NAME[1:]) is None
    assert keep.load(NAME[0], (64, 128), None) is None


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda data: data[: len(data) // 2], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: b"PK" + data, "is damaged"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
        (lambda data: signed(pickle.dumps(("not", "a", "program"))), "cannot be used"),
    ],
    ids=["half", "empty", "foreign", "a bit", "another compiler's"],
)
def test_a_damaged_file_is_not_used_with_a_line_and_replaced(keep, kept, program, caplog, damage, line):
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert keep.load(*NAME) is None
    assert line in caplog.text
    keep.save(*NAME, program)
    assert [kept] == list(kept.parent.iterdir())
    assert keep.load(*NAME) is not None


def signed(body: bytes) -> bytes:
    """Return a file as `KeptPrograms` writes it."""
    return kept_programs._MAGIC + hashlib.sha256(body).digest() + body


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def open_to_all(folder: Path, file: Path) -> None:
    file.chmod(0o666)


def in_an_open_folder(folder: Path, file: Path) -> None:
    folder.chmod(0o777)


def linked(folder: Path, file: Path) -> None:
    other = folder.parent / "elsewhere"
    file.rename(other)
    file.symlink_to(other)


@pytest.mark.parametrize(
    ("expose", "line"),
    [
        (open_to_all, "can be written by others"),
        (in_an_open_folder, "can be written by others"),
        (linked, "is a symbolic link"),
    ],
)
def test_a_file_that_others_may_have_written_is_never_read(keep, kept, caplog, tmp_path, expose, line):
    kept.write_bytes(signed(pickle.dumps(Trap(tmp_path / "mark"))))
    expose(kept.parent, kept)
    assert keep.load(*NAME) is None
    assert line in caplog.text
    assert not (tmp_path / "mark").exists()


def test_the_file_of_another_user_is_never_read(keep, kept, caplog, monkeypatch):
    owner = kept.stat()
    facts = SimpleNamespace(st_mode=owner.st_mode, st_uid=os.geteuid() + 1)
    monkeypatch.setattr(Path, "lstat", lambda self: facts)
    assert keep.load(*NAME) is None
    assert "not to this user or root" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_line(keep, program, caplog, tmp_path):
    (tmp_path / "programs").write_text("a file, not a folder")
    keep.save(*NAME, program)
    assert "is not kept, the next start compiles it again" in caplog.text
    assert keep.load(*NAME) is None
    assert "cannot be used, and is compiled again" in caplog.text


def test_programs_made_ahead_are_loaded_from_a_folder_that_is_only_read(
    keep, kept, program, mesh, tmp_path, monkeypatch
):
    def forbidden(*_: object) -> None:
        raise PermissionError("the folder belongs to root")

    ahead = KeptPrograms(None, {"made": "for a test"}, mesh, kept.parent)
    monkeypatch.setattr(os, "utime", forbidden)
    assert ahead.find(*NAME) == kept
    assert ahead.load(*NAME) is not None
    ahead.save("snapshot", *NAME[1:], program)
    assert list(kept.parent.iterdir()) == [kept]
    both = KeptPrograms(tmp_path / "own", {"made": "for a test"}, mesh, kept.parent)
    both.save("snapshot", *NAME[1:], program)
    assert [each.parent.name for each in (both.find(*NAME), both.find("snapshot", *NAME[1:])) if each] == [
        "programs", "own",
    ]  # fmt: skip
    kept.chmod(0o666)
    assert both.find(*NAME) is None


@pytest.mark.parametrize("there", [(), ("whole",), ("tiles",), ("whole", "tiles")])
def test_a_start_decodes_in_tiles_at_once_if_only_such_programs_are_kept(shipped, devices, cache, monkeypatch, there):
    setting = Setting(slots_per_device=1, resolutions=((64, 64),))
    made: list[bool] = []

    def geometry(in_tiles: bool) -> dict[Any, Any]:
        return {(64, 64): "tiles" if in_tiles else "whole"}

    def compile_programs(checkpoint, params, safety, geometries, *_: object) -> str:
        made.append(geometries == geometry(True))
        return "programs"

    monkeypatch.setattr(program_setting, "compile_programs", compile_programs)
    monkeypatch.setattr(KeptPrograms, "find", lambda self, kind, lane, size: size if size in there else None)
    monkeypatch.setattr(
        program_setting, "geometries_of", lambda checkpoint, setting, mesh, in_tiles: geometry(in_tiles)
    )
    program_setting.compile_setting(shipped, setting, make_mesh(devices[:1]), cache)
    assert made == [there == ("tiles",)]


def test_what_killed_processes_left_and_what_is_too_much_is_deleted(keep, kept, program, monkeypatch):
    monkeypatch.setattr(kept_programs, "_MOST", 2)
    old = [kept.with_name(f"old-{i}.program") for i in range(4)]
    half, fresh_half = kept.with_name("tick.program.1a"), kept.with_name("tick.program.2b")
    for i, file in enumerate([*old, half, fresh_half, kept]):
        file.touch()
        os.utime(file, (time.time() - 7200 + i,) * 2)
    os.utime(fresh_half)
    assert keep.load(*NAME) is not None, "it counts as used now"
    keep.save("snapshot", *NAME[1:], program)
    left = set(kept.parent.iterdir())
    assert {kept, fresh_half} < left
    assert len(left) == 3


def test_everything_that_a_program_is_made_of_names_its_file(shipped, devices, mesh, tmp_path, monkeypatch):
    def path(params=shipped.params, mesh=mesh, others=None, family=shipped.family) -> str:
        return KeptPrograms(tmp_path, facts_of(family, params, mesh, others), mesh)._name(*NAME)

    other = replace(shipped.family, configs={**shipped.family.configs, "unet": {}})
    first = path()
    assert path() == first
    in_half = {
        part: {name: leaf.astype(np.float16) for name, leaf in of.items()} for part, of in shipped.params.items()
    }
    others = [path(params=in_half), path(mesh=make_mesh(devices[1:3])), path(mesh=make_mesh(devices[:3])),
              path(others="a safety checker"), path(family=other)]  # fmt: skip
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, os.environ.get(name, "") + " --an-option=1")
        others.append(path())
    monkeypatch.setattr(kept_programs, "package_versions", lambda names: {"jax": "99"})
    others.append(path())
    monkeypatch.setattr(kept_programs, "_machine", lambda: "another processor")
    others.append(path())
    assert len({first, *others}) == 1 + len(others)
