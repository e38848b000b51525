"""Weighted prompts, long ones and textual inversion: PyTorch's pictures, and the same ones in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.aggregator.plan import Phase
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.errors import InvalidRequest, SnapshotMismatch
from tests.support import weighted_cases
from tests.support.checkpoints import make_random_checkpoint
from tests.support.engines import on_one_device, prepare_with_scheduler, run_alone
from tests.support.picture_cases import make_image, make_mask
from tests.support.weighted_cases import MODELS, WINDOWS, WORDS, embedding_tensors

GOLDEN = Path(__file__).parent / "golden"
CASES = weighted_cases.cases()
PLAIN_AND_NOT: list[dict[str, Any]] = [{"prompt_syntax": "plain"}, {"prompt_syntax": "weighted"}]
KINDS: list[dict[str, Any]] = [
    {},
    {"prompt": "a (red:1.4) circle"},
    {"prompt": "a red circle BREAK a (green:1.2) star"},
    {"prompt": "a red circle", "negative_prompt": "black BREAK blue BREAK [star]", "num_inference_steps": 9},
    {"prompt": "an inkstyle circle", "prompt_syntax": "plain"},
]


def make_engine(model, devices, compile_cache, folder) -> Engine:
    make_random_checkpoint(folder, xl=model == "xl", unet=dict(MODELS[model]))
    (folder / "words").mkdir()
    for word in WORDS:
        save_file(embedding_tensors(word, model), folder / "words" / f"{word}.safetensors")
    options = LoadOptions(prompt_windows=WINDOWS, embeddings=str(folder / "words"))
    return Engine(load_checkpoint(str(folder), options=options), devices[:2], 2, None, compile_cache)


@pytest.fixture(scope="module", params=["sd", "xl"])
def engine(request, devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine(request.param, devices, compile_cache, tmp_path_factory.mktemp("prompts") / request.param)


def ask(engine: Engine, task_id: str = "job", **parameters) -> PreparedJob:
    asked: dict[str, Any] = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 6, "sampler": "ddim"}
    if parameters:
        asked["prompt_syntax"] = "weighted"
    return engine.prepare(task_id, GenerationRequest(**{**asked, **parameters}))


@pytest.fixture(scope="module")
def golden() -> np.ndarray:
    with np.load(GOLDEN / "prompts.npz") as file:
        pixels = file["pixels"]
    assert len(pixels) == len(CASES), "run tools/oracle/prompts.py again: the cases have changed"
    return pixels


def prepare_case(engine: Engine, number: int) -> PreparedJob:
    case = CASES[number]
    request = GenerationRequest(**case.request, seed=weighted_cases.SEED)
    return prepare_with_scheduler(engine, case.scheduler, str(number), request)


def test_pictures_are_those_of_pytorch(engine, golden):
    model = "xl" if "text_encoder_2" in engine.checkpoint.params else "sd"
    numbers = [i for i, case in enumerate(CASES) if case.model == model]
    jobs = [prepare_case(engine, i) for i in numbers]
    assert {job.load.windows for job in jobs} == {0, 1, 2}
    images = generate(engine, jobs, steps_per_tick=3)
    wrong = []
    for i, image in zip(numbers, images, strict=True):
        error = np.abs(image.pixels.astype(int) - golden[i])
        if error.max() > 2 or np.mean(error**2) > 255**2 / 10**5.5:  # 55 dB
            wrong.append((error.max(), CASES[i].request))
    assert not wrong, f"{len(wrong)} of {len(numbers)}: {wrong[:5]}"


def test_the_golden_pictures_tell_one_prompt_from_another(golden):
    """What a weight, a window and a word change is far more than the parity test forgives."""
    for model in ("sd", "xl"):
        drawn = [golden[i].astype(int) for i, case in enumerate(CASES) if case.model == model]
        differences = [np.abs(one - other).max() for i, one in enumerate(drawn) for other in drawn[:i]]
        assert min(differences) > 10


def test_weighted_long_and_plain_jobs_draw_together_what_they_draw_alone_and_nothing_is_traced(engine):
    traces = engine.traces_since_ready
    jobs = [ask(engine, str(i), **kind) for i, kind in enumerate(KINDS * 4)]
    together = {image.task_id: image.pixels for image in generate(engine, jobs, steps_per_tick=2)}
    for i, kind in enumerate(KINDS):
        job = ask(engine, "alone", **kind)
        for device, slot in ((0, 1), (1, 0)):
            engine.reset()
            alone = run_alone(engine, job, device, slot, [1] * job.num_steps).pixels
            for j in range(i, len(jobs), len(KINDS)):
                np.testing.assert_array_equal(together[str(j)], alone)
    assert len({together[str(i)].tobytes() for i in range(len(KINDS))}) == len(KINDS)
    assert engine.traces_since_ready == traces


def test_a_weighted_prompt_without_weights_draws_what_the_plain_one_draws(engine):
    plain, weighted = (run_alone(engine, ask(engine, seed=5, **kind), 0, 0, [6]).pixels for kind in PLAIN_AND_NOT)
    np.testing.assert_array_equal(plain, weighted)


@pytest.fixture(scope="module")
def sd(devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine("sd", devices, compile_cache, tmp_path_factory.mktemp("prompts") / "other")


def test_a_long_prompt_parks_and_resumes_elsewhere_bit_for_bit_and_no_other_job_resumes_from_it(sd):
    asked: dict[str, Any] = {
        "prompt": "a (red:1.3) circle BREAK a star",
        "negative_prompt": "black",
        "num_inference_steps": 8,
    }
    job = ask(sd, **asked)
    whole = run_alone(sd, job, 0, 0, [8]).pixels
    run_alone(sd, job, 0, 1, [3])
    snapshot = sd.snapshot(job.lane, 0, 1)
    data = snapshot.to_bytes()
    for resumed in (snapshot, sd.read_snapshot(data, job)):
        sd.restore(job.lane, 1, 0, resumed)
        sd.execute(on_one_device(sd, job.lane, 1, Phase(steps=5)), {}).wait()
        (image,) = sd.execute(on_one_device(sd, job.lane, 1, Phase(decode=(0, "job"))), {}).wait()
        np.testing.assert_array_equal(image.pixels, whole)
        sd.reset()
    for other in ({**asked, "prompt": "a red circle"}, {**asked, "negative_prompt": "black BREAK blue"}):
        with pytest.raises(SnapshotMismatch, match="of a job with other parameters"):
            sd.read_snapshot(data, ask(sd, **other))


def test_snapshots_of_another_number_of_windows_or_of_other_words_are_refused(sd, devices, compile_cache):
    job = ask(sd, prompt="a red circle BREAK a star")
    run_alone(sd, job, 0, 0, [3])
    snapshot = sd.snapshot(job.lane, 0, 0)
    folder = Path(sd.checkpoint.name)
    others = []
    for options in (LoadOptions(prompt_windows=2), LoadOptions(prompt_windows=WINDOWS)):
        checkpoint = load_checkpoint(str(folder), options=options)
        others.append(Engine(checkpoint, devices[:2], 2, None, compile_cache))
    assert not any(other.accepts(snapshot) for other in others)
    with pytest.raises(SnapshotMismatch, match="not a snapshot of any resolution"):
        others[0].read_snapshot(snapshot.to_bytes(), job)
    with pytest.raises(SnapshotMismatch, match="another configuration"):
        others[1].read_snapshot(snapshot.to_bytes(), job)


def test_a_prompt_with_too_many_windows_is_refused_with_the_numbers(sd):
    ask(sd, prompt=" BREAK ".join("abcd"))
    for name in ("prompt", "negative_prompt"):
        text = rf"^{name} must have at most 4 windows of 75 tokens \(sdtpu_prompt_windows\), got 33 characters"
        with pytest.raises(InvalidRequest, match=text):
            ask(sd, **{name: " BREAK ".join("abcde")})


def test_windows_cost_their_own_device_more_and_the_policy_knows(sd):
    costs = calibrate(sd).costs[sd.info.resolutions[0]].cost
    assert costs.window_s >= 0
    assert costs.window_insert_s >= 0
    assert costs.step_of([], 2) == costs.step_s + 2 * costs.window_s
    assert [ask(sd, **kind).load.windows for kind in KINDS] == [0, 0, 1, 2, 0]


def test_one_window_leaves_no_trace_in_the_slots(sd):
    checkpoint = load_checkpoint(sd.checkpoint.name, options=LoadOptions(prompt_windows=1))
    size = sd.info.resolutions[0]
    assert checkpoint.family.conditioning_shapes(size).keys() == {"context"}
    assert "windows" not in checkpoint.family.input_shapes()
    kept = sd.checkpoint.family.conditioning_shapes(size)
    assert kept["further_context"].shape == (WINDOWS - 1, 77, 32)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["edit", "inpainting"])
def test_models_that_see_a_picture_take_long_prompts_beside_plain_ones(model, devices, compile_cache, tmp_path):
    make_random_checkpoint(tmp_path / "checkpoint", unet=dict(MODELS[model]))
    checkpoint = load_checkpoint(str(tmp_path / "checkpoint"))
    engine = Engine(checkpoint, devices[:2], 2, None, compile_cache)
    pictures = {"image": make_image(0), **({"mask_image": make_mask(1)} if model == "inpainting" else {})}
    kinds = [{"prompt": "a red circle"}, {"prompt": "a (red:1.3) circle BREAK a star", "prompt_syntax": "weighted"}]

    def prepare(task_id: str, kind: dict[str, Any]) -> PreparedJob:
        asked: dict[str, Any] = {"seed": 5, "num_inference_steps": 4, **kind, **dict.fromkeys(pictures, "redis:x")}
        return engine.prepare(task_id, GenerationRequest(**asked), pictures)

    jobs = [prepare(str(i), kind) for i, kind in enumerate(kinds * 3)]
    together = generate(engine, jobs, steps_per_tick=2)
    for i, kind in enumerate(kinds):
        engine.reset()
        job = prepare("alone", kind)
        alone = run_alone(engine, job, 1, 1, [1] * job.num_steps).pixels
        for image in together[i::2]:
            np.testing.assert_array_equal(image.pixels, alone)
    assert (together[0].pixels != together[1].pixels).any()
