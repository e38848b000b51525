"""Park and resume: a job's whole state leaves the device and comes back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import Checkpoint, load_checkpoint
from sdtpu_worker.diffusion.checkpoint_folder import find_folder
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.slots import Geometry, Slots
from sdtpu_worker.diffusion.snapshot import JobSnapshot, fingerprint_of
from sdtpu_worker.errors import SnapshotMismatch
from sdtpu_worker.testing import FakeSnapshot
from tests.support.engines import on_one_device, run_alone
from tests.support.paths import ROOT, XLA_CACHE

# with noise at every step, which must be the same after a move
REQUEST = GenerationRequest("a red circle", seed=2**40 + 7, num_inference_steps=9, sampler="sde-dpmsolver++")
ELSEWHERE = """
import sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from sdtpu_worker.aggregator.plan import Phase
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.sharding import find_devices
from tests.support.engines import on_one_device
folder, cache, dtype, file = sys.argv[1:]
devices = find_devices("cpu", 8)
engine = Engine(load_checkpoint(folder, getattr(jnp, dtype)), devices, 2, None, CompileCache(cache))
request = GenerationRequest("a red circle", seed=2**40 + 7, num_inference_steps=9, sampler="sde-dpmsolver++")
lane, job = engine.info.resolutions[0], engine.prepare("it", request)
snapshot = engine.read_snapshot(Path(file).read_bytes(), job)
engine.restore(lane, 5, 0, snapshot)
plan = on_one_device(engine, lane, 5, Phase(steps=9 - snapshot.step), Phase(decode=(0, "it")))
np.save(file + ".npy", engine.execute(plan, {}).wait()[0].pixels)
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16", "xl-float32"])
def folder_and_dtype(request, random_checkpoint, random_xl_checkpoint):
    return random_xl_checkpoint if "xl" in request.param else random_checkpoint, request.param.removeprefix("xl-")


@pytest.fixture(scope="module")
def engine(folder_and_dtype, devices, compile_cache):
    folder, dtype = folder_and_dtype
    return Engine(load_checkpoint(str(folder), getattr(jnp, dtype)), devices, 2, None, compile_cache)


def start(engine, device: int, slot: int, steps: int):
    job = engine.prepare("it", REQUEST)
    plan = on_one_device(engine, job.lane, device, Phase(insert=(slot, "it"), steps=steps))
    engine.execute(plan, {"it": job}).wait()
    return job


def test_a_job_goes_on_bit_for_bit_on_another_device_and_slot(engine):
    job = start(engine, 0, 0, 9)
    reference = run_alone(engine, job, 0, 0, [9]).pixels
    for steps in (1, 4, 8):
        start(engine, 2, 1, steps)
        snapshot = engine.snapshot(job.lane, 2, 1)
        assert snapshot.step == steps
        start(engine, 6, 0, 3)  # a stranger where it will go
        engine.restore(job.lane, 6, 0, engine.read_snapshot(snapshot.to_bytes(), job))
        plan = on_one_device(engine, job.lane, 6, Phase(steps=20), Phase(decode=(0, "it")))
        (image,) = engine.execute(plan, {}).wait()
        np.testing.assert_array_equal(image.pixels, reference)


def test_a_plan_parks_one_job_for_another_and_resumes_it_with_both_bit_for_bit(engine):
    job, other = engine.prepare("it", REQUEST), engine.prepare("other", GenerationRequest("a blue star", seed=1))
    references = [run_alone(engine, j, 0, 0, [j.num_steps]).pixels for j in (job, other)]
    lane, idle = job.lane, ((),) * 7
    engine.execute(Plan(lane, ((Phase(insert=(0, "it"), steps=5),), *idle)), {"it": job})
    parking = Plan(lane, ((Phase(insert=(0, "other"), steps=other.num_steps),), *idle), parked=(Place("it", 0, 0),))
    tick = engine.execute(parking, {"other": other})
    resuming = Plan(
        lane,
        ((Phase(decode=(0, "other")),), (), (), (Phase(steps=4), Phase(decode=(1, "it"))), *idle[3:]),
        resumed=(Place("it", 3, 1),),
    )
    images = {image.task_id: image for image in engine.execute(resuming, {}, tick.parked).wait()}
    np.testing.assert_array_equal(images["it"].pixels, references[0])
    np.testing.assert_array_equal(images["other"].pixels, references[1])


@pytest.mark.slow
def test_a_job_goes_on_bit_for_bit_in_another_process(engine, folder_and_dtype, tmp_path):
    job = start(engine, 0, 0, 9)
    reference = run_alone(engine, job, 0, 0, [9]).pixels
    start(engine, 1, 1, 4)
    file = tmp_path / "snapshot"
    file.write_bytes(engine.snapshot(job.lane, 1, 1).to_bytes())
    folder, dtype = folder_and_dtype
    command = [sys.executable, "-c", ELSEWHERE, str(folder), XLA_CACHE, dtype, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(f"{file}.npy"), reference)


def test_a_snapshot_of_another_configuration_is_refused(engine, shipped, devices, compile_cache):
    job = start(engine, 0, 0, 3)
    lane = engine.info.resolutions[0]
    snapshot = engine.snapshot(lane, 0, 0)
    stranger = JobSnapshot("0123", snapshot.lane, snapshot.arrays)
    assert engine.accepts(snapshot)
    assert not engine.accepts(stranger)
    with pytest.raises(SnapshotMismatch, match=r"made by another configuration .*start the job anew"):
        engine.restore(lane, 0, 0, stranger)
    other = Engine(engine.checkpoint, devices[:2], 1, None, compile_cache)
    with pytest.raises(SnapshotMismatch, match="another configuration"):
        other.restore(lane, 0, 0, snapshot)
    with pytest.raises(SnapshotMismatch, match="another configuration"):
        other.read_snapshot(snapshot.to_bytes(), job)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("vae", "scaling_factor", 0.5), ("unet", "freq_shift", 1), ("scheduler", "beta_end", 0.01)],
)
def test_a_changed_config_is_another_configuration_though_all_weights_are_equal(tmp_path, part, key, value):
    folder = tmp_path / "copy"
    shutil.copytree(find_folder("embedded", "main"), folder)
    before = fingerprint(load_checkpoint(str(folder)))
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(file.read_text())
    assert config.get(key) != value
    file.write_text(json.dumps({**config, key: value}))
    assert fingerprint(load_checkpoint(str(folder))) != before == fingerprint(load_checkpoint("embedded"))


def fingerprint(checkpoint: Checkpoint) -> str:
    lane = checkpoint.family.default_size
    return fingerprint_of(checkpoint, lane, Geometry.of(checkpoint.family, 1, 1, lane), "cpu")


# --- bytes that anybody who can write to Redis may have written ---


@pytest.fixture(scope="module")
def genuine(engine):
    job = start(engine, 0, 0, 4)
    return job, engine.snapshot(job.lane, 0, 0)


def forge(snapshot: JobSnapshot, **fields) -> bytes:
    """Return the bytes of a snapshot of the right shapes with other values."""
    state = jax.tree.map(np.array, snapshot.state)._asdict()
    for name, value in fields.items():
        state[name][...] = value
    return JobSnapshot(snapshot.fingerprint, snapshot.lane, Slots(**state)).to_bytes()


def test_a_snapshot_that_is_written_and_read_is_the_same_bit_for_bit(engine, genuine):
    job, snapshot = genuine
    copy = engine.read_snapshot(snapshot.to_bytes(), job)
    assert (copy.fingerprint, copy.lane, copy.step) == (snapshot.fingerprint, snapshot.lane, 4)
    for got, wanted in zip(jax.tree.leaves(copy.state), jax.tree.leaves(snapshot.state), strict=True):
        assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def test_a_snapshot_that_inflates_without_end_takes_no_memory(engine, genuine):
    """0.4 MB of zeros, deflated, became 400 MB."""
    job, snapshot = genuine
    head = f"{snapshot.fingerprint} {snapshot.lane[0]} {snapshot.lane[1]}\n".encode()
    bombs = [zlib.compress(start + bytes(2**28)) for start in (b"", head, b'{"arrays": [["float32", [1000000000]]]}\n')]
    tracemalloc.start()
    for data in bombs:
        with pytest.raises(SnapshotMismatch, match="not a snapshot"):
            engine.read_snapshot(data, job)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000 + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(snapshot.state))


OLD = '{"fingerprint": "0", "lane": [8, 8], "table_rows": 1000, "arrays": [["float32", [1]]]}\n'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        zlib.compress(b""),
        zlib.compress(b"\n"),
        zlib.compress(b"0123 0 0\n"),
        zlib.compress(b"0123 999999 999999\n"),
        zlib.compress(b"[" * 100_000),
        zlib.compress(OLD.encode() + bytes(4)),
        zlib.compress(OLD.replace("1000", "10**12").encode() + bytes(4)),
        zlib.compress(OLD.replace("[1]", "[-1]").encode()),
        zlib.compress(OLD.replace("float32", "object").encode()),
    ],
)
def test_bytes_that_are_no_snapshot_are_a_mismatch(engine, genuine, data):
    with pytest.raises(SnapshotMismatch, match="not a snapshot"):
        engine.read_snapshot(data, genuine[0])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_with_faults_in_them_are_a_mismatch_or_the_same_snapshot(engine, genuine, data):
    job, snapshot = genuine
    is_inflated = data.draw(st.booleans())
    raw = bytearray(zlib.decompress(snapshot.to_bytes()) if is_inflated else snapshot.to_bytes())
    last = raw.index(b"\n") if is_inflated else len(raw) - 1  # of the bytes that are not merely another picture
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, 255)), max_size=4)):
        raw[at] = byte
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    raw = raw[:cut] + data.draw(st.just(b"") | st.binary(max_size=20))
    try:
        copy = engine.read_snapshot(zlib.compress(raw, level=1) if is_inflated else bytes(raw), job)
    except SnapshotMismatch:
        return
    pairs = zip(jax.tree.leaves(copy.state), jax.tree.leaves(snapshot.state), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"step": -1}, "at step -1 of 9"),
        ({"step": 10}, "at step 10 of 9"),
        ({"step": 2**31 - 1}, "at step 2147483647 of 9"),
        ({"step": 2**31 - 1, "num_steps": 2**31 - 1}, "other parameters"),
        ({"num_steps": 0}, "other parameters"),
        ({"num_steps": 1000}, "other parameters"),
        ({"guidance_scale": 1000}, "other parameters"),
        ({"guidance_scale": np.nan}, "other parameters"),
        ({"table": 1e30}, "other parameters"),
        ({"guidance_rescale": 0.5}, "other parameters"),
        ({"key_data": 7}, "other parameters"),
    ],
)
def test_a_forged_state_cannot_choose_how_the_devices_go_on(engine, genuine, fields, reason):
    job, snapshot = genuine
    with pytest.raises(SnapshotMismatch, match=rf"{reason}.*start the job anew"):
        engine.read_snapshot(forge(snapshot, **fields), job)
    assert engine.read_snapshot(forge(snapshot, step=9), job).step == 9, "it was about to be decoded"


def test_a_snapshot_of_another_job_is_a_mismatch(engine, genuine):
    _, snapshot = genuine
    for change in ({"num_inference_steps": 8}, {"guidance_scale": 3.0}, {"sampler": "ddim"}, {"seed": 8}):
        job = engine.prepare("other", dataclasses.replace(REQUEST, **change))
        with pytest.raises(SnapshotMismatch, match="other parameters"):
            engine.read_snapshot(snapshot.to_bytes(), job)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 13}, {"step": 10**400}, {"step": 5.0}, {"step": True}, {"step": None},
        {"steps_left": -5}, {"steps_left": 8}, {"value": "x"}, {"value": float("nan")}, {"task_id": 7}, {"more": 1},
    ],
)  # fmt: skip
def test_the_fake_engines_snapshot_is_checked_as_well(change):
    state = FakeSnapshot("it", value=105, step=5, steps_left=7)
    assert FakeSnapshot.from_bytes(state.to_bytes(), 12) == FakeSnapshot.from_bytes(state.to_bytes()) == state
    with pytest.raises(SnapshotMismatch, match="start the job anew"):
        FakeSnapshot.from_bytes(json.dumps({**vars(state), **change}).encode(), 12)
    for data in (b"[" * 2000, b"[" * 10**6, b"9" * 4000, b"\xff", b"7"):
        with pytest.raises(SnapshotMismatch, match="start the job anew"):
            FakeSnapshot.from_bytes(data, 12)


def test_a_snapshot_is_small(engine):
    start(engine, 0, 0, 3)
    snapshot = engine.snapshot(engine.info.resolutions[0], 0, 0)
    assert len(snapshot.to_bytes()) < sum(leaf.nbytes for leaf in jax.tree.leaves(snapshot.state)) / 2
