"""Park and resume: a job's whole state leaves the device and comes back, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.snapshot import JobSnapshot
from sdtpu_worker.errors import SnapshotMismatch
from tests.conftest import XLA_CACHE
from tests.device.engines import on_one_device, run_alone

REQUEST = GenerationRequest("a red circle", seed=2**40 + 7, num_inference_steps=9, sampler="dpmsolver++")
ELSEWHERE = """
import sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from sdtpu_worker.aggregator.plan import Phase
from sdtpu_worker.diffusion.cache import CompileCache
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.sharding import find_devices
from sdtpu_worker.diffusion.snapshot import JobSnapshot
from tests.device.engines import on_one_device
folder, cache, dtype, file = sys.argv[1:]
devices = find_devices("cpu", 8)
engine = Engine(load_checkpoint(folder, getattr(jnp, dtype)), devices, 2, None, CompileCache(cache))
lane, snapshot = engine.info.resolutions[0], JobSnapshot.from_bytes(Path(file).read_bytes())
engine.restore(lane, 5, 0, snapshot)
plan = on_one_device(engine, lane, 5, Phase(steps=9 - snapshot.step), Phase(decode=(0, "it")))
np.save(file + ".npy", engine.execute(plan, {}).wait()[0].pixels)
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request, random_checkpoint):
    checkpoint = load_checkpoint(str(random_checkpoint), getattr(jnp, request.param))
    return Engine(checkpoint, pytest.devices, 2, None, pytest.compile_cache)


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
        engine.restore(job.lane, 6, 0, JobSnapshot.from_bytes(snapshot.to_bytes()))
        plan = on_one_device(engine, job.lane, 6, Phase(steps=20), Phase(decode=(0, "it")))
        (image,) = engine.execute(plan, {}).wait()
        np.testing.assert_array_equal(image.pixels, reference)


def test_a_plan_parks_one_job_for_another_and_resumes_it_with_both_bit_for_bit(engine):
    job, other = engine.prepare("it", REQUEST), engine.prepare("other", GenerationRequest("a blue star", seed=1))
    references = [run_alone(engine, j, 0, 0, [j.num_inference_steps]).pixels for j in (job, other)]
    lane, idle = job.lane, ((),) * 7
    engine.execute(Plan(lane, ((Phase(insert=(0, "it"), steps=5),), *idle)), {"it": job})
    parking = Plan(lane, ((Phase(insert=(0, "other"), steps=50),), *idle), parked=(Place("it", 0, 0),))
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
def test_a_job_goes_on_bit_for_bit_in_another_process(engine, random_checkpoint, tmp_path):
    job = start(engine, 0, 0, 9)
    reference = run_alone(engine, job, 0, 0, [9]).pixels
    start(engine, 1, 1, 4)
    file = tmp_path / "snapshot"
    file.write_bytes(engine.snapshot(job.lane, 1, 1).to_bytes())
    dtype = engine.checkpoint.dtype.__name__
    command = [sys.executable, "-c", ELSEWHERE, str(random_checkpoint), XLA_CACHE, dtype, str(file)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(f"{file}.npy"), reference)


def test_a_snapshot_of_another_configuration_is_refused(engine, shipped):
    start(engine, 0, 0, 3)
    lane = engine.info.resolutions[0]
    snapshot = engine.snapshot(lane, 0, 0)
    stranger = JobSnapshot("0123", snapshot.lane, snapshot.arrays)
    assert engine.accepts(snapshot)
    assert not engine.accepts(stranger)
    with pytest.raises(SnapshotMismatch, match=r"made by another configuration .*start the job anew"):
        engine.restore(lane, 0, 0, stranger)
    other = Engine(engine.checkpoint, pytest.devices[:2], 1, None, pytest.compile_cache)
    with pytest.raises(SnapshotMismatch, match="another configuration"):
        other.restore(lane, 0, 0, snapshot)
    for data in (b"", b"nonsense", snapshot.to_bytes()[:100]):
        with pytest.raises(SnapshotMismatch, match="not a snapshot"):
            JobSnapshot.from_bytes(data)


def test_a_snapshot_is_small(engine):
    start(engine, 0, 0, 3)
    snapshot = engine.snapshot(engine.info.resolutions[0], 0, 0)
    assert len(snapshot.to_bytes()) < sum(leaf.nbytes for leaf in snapshot.state) / 2
