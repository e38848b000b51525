"""LoRAs of single jobs: equal to PyTorch's pipelines, to themselves in any company, and found without a restart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob, prepare_job
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint, InvalidRequest, SnapshotMismatch
from tests.support import adapter_cases
from tests.support.adapter_cases import LAYOUTS, MODELS, RANK, lora_tensors
from tests.support.checkpoints import make_random_checkpoint
from tests.support.engines import on_one_device, prepare_with_scheduler, run_alone

GOLDEN = Path(__file__).parent / "golden"
CASES = adapter_cases.cases()
PARTS = ("unet", "text_encoder", "text_encoder_2")


def write_loras(folder: Path, checkpoint: Path) -> Path:
    """Write one LoRA for each layout; return the folder."""
    folder.mkdir()
    shapes = {}
    for part in PARTS:
        for path in (checkpoint / part).glob("*.safetensors"):
            shapes[part] = {name: array.shape for name, array in load_file(path).items()}
    for layout in LAYOUTS:
        save_file(lora_tensors(layout, shapes), folder / f"{layout}.safetensors")
    return folder


def make_engine(model, devices, compile_cache, folder, slots=2, rank=8) -> Engine:
    make_random_checkpoint(folder, xl=model == "xl", unet=dict(MODELS[model]))
    options = LoadOptions(loras=str(write_loras(folder / "loras", folder)), lora_rank=rank)
    return Engine(load_checkpoint(str(folder), options=options), devices[:2], slots, None, compile_cache)


@pytest.fixture(scope="module", params=["sd", "xl"])
def engine(request, devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine(request.param, devices, compile_cache, tmp_path_factory.mktemp("adapters") / request.param)


def ask(engine: Engine, task_id: str, loras=(), **parameters) -> PreparedJob:
    asked: dict[str, Any] = {"num_inference_steps": 6, "seed": 5, "sampler": "ddim", **parameters}
    return engine.prepare(task_id, GenerationRequest("a red circle", loras=loras, **asked))


def test_jobs_with_different_loras_and_with_none_draw_together_what_they_draw_alone(engine):
    kinds: list[dict[str, Any]] = [
        {},
        {"loras": ["kohya"]},
        {"loras": [("kohya", 0.5)], "num_inference_steps": 9},
        {"loras": [["diffusers", 1.0], ["peft", -0.5]]},
        {"loras": [("peft", 2)], "sampler": "euler_ancestral"},
    ]
    jobs = [ask(engine, str(i), **kind) for i, kind in enumerate(kinds * 4)]
    together = {image.task_id: image.pixels for image in generate(engine, jobs, steps_per_tick=2)}
    for i, kind in enumerate(kinds):
        job = ask(engine, "alone", **kind)
        for device, slot in ((0, 1), (1, 0)):
            alone = run_alone(engine, job, device, slot, [1] * job.num_steps).pixels
            for j in range(i, len(jobs), len(kinds)):
                np.testing.assert_array_equal(together[str(j)], alone)
    assert len({together[str(i)].tobytes() for i in range(len(kinds))}) == len(kinds)
    assert engine.traces_since_ready == 0


@pytest.fixture(scope="module")
def golden() -> np.ndarray:
    with np.load(GOLDEN / "adapters.npz") as file:
        pixels = file["pixels"]
    assert len(pixels) == len(CASES), "run tools/oracle/adapters.py again: the cases have changed"
    return pixels


def prepare_case(engine: Engine, number: int) -> PreparedJob:
    case = CASES[number]
    asked: dict[str, Any] = {**case.request, "loras": list(case.loras)}
    request = GenerationRequest(**asked, seed=adapter_cases.SEED)
    return prepare_with_scheduler(engine, case.scheduler, str(number), request)


def test_pictures_are_those_of_pytorchs_pipelines_in_every_layout_and_with_every_weight(engine, golden):
    model = "xl" if "text_encoder_2" in engine.checkpoint.params else "sd"
    numbers = [i for i, case in enumerate(CASES) if case.model == model]
    images = generate(engine, [prepare_case(engine, i) for i in numbers], steps_per_tick=3)
    wrong = []
    for i, image in zip(numbers, images, strict=True):
        error = np.abs(image.pixels.astype(int) - golden[i])
        if error.max() > 2 or np.mean(error**2) > 255**2 / 10**5.5:  # 55 dB
            wrong.append((error.max(), CASES[i].loras))
    assert not wrong, f"{len(wrong)} of {len(numbers)}: {wrong[:5]}"


def test_the_golden_pictures_show_loras(golden):
    """What a LoRA adds is far more than the parity test forgives."""
    first = {tuple(case.loras[0]): golden[i].astype(int) for i, case in enumerate(CASES) if len(case.loras) == 1}
    for layout in LAYOUTS:
        assert np.abs(first[layout, 1.0] - first[layout, -0.5]).max() > 10


@pytest.fixture(scope="module")
def sd(devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine("sd", devices, compile_cache, tmp_path_factory.mktemp("adapters") / "other", slots=2)


@pytest.fixture
def folder(sd) -> Path:
    return Path(sd.checkpoint.name) / "loras"


def test_a_job_parks_and_resumes_on_another_device_bit_for_bit_and_no_other_job_resumes_from_it(sd):
    job = ask(sd, "job", [("kohya", 0.8)], num_inference_steps=8)
    whole = run_alone(sd, job, 0, 0, [8]).pixels
    run_alone(sd, ask(sd, "stranger", ["peft"]), 1, 1, [1])  # so that its entry there is another one
    run_alone(sd, job, 0, 1, [3])
    snapshot = sd.snapshot(job.lane, 0, 1)
    data = snapshot.to_bytes()
    for resumed in (snapshot, sd.read_snapshot(data, job)):
        sd.restore(job.lane, 1, 0, resumed)
        sd.execute(on_one_device(sd, job.lane, 1, Phase(steps=5)), {}).wait()
        (image,) = sd.execute(on_one_device(sd, job.lane, 1, Phase(decode=(0, "job"))), {}).wait()
        np.testing.assert_array_equal(image.pixels, whole)
        sd.reset()
    for others in ([("kohya", 0.7)], ["kohya", ("peft", 0.0)], ["peft"], []):
        with pytest.raises(SnapshotMismatch):
            sd.read_snapshot(data, ask(sd, "job", others, num_inference_steps=8))


def test_a_plan_parks_and_resumes_jobs_with_loras_among_starting_ones(sd):
    jobs = {name: ask(sd, name, [name], num_inference_steps=6) for name in LAYOUTS}
    alone = {name: run_alone(sd, job, 0, 0, [6]).pixels for name, job in jobs.items()}
    sd.reset()
    lane = jobs["kohya"].lane
    first = Phase(insert=(0, "kohya"), steps=3)
    sd.execute(on_one_device(sd, lane, 0, first), jobs)
    second = Plan(lane, ((Phase(insert=(0, "peft"), steps=6),), ()), parked=(Place("kohya", 0, 0),))
    tick = sd.execute(second, jobs)
    third = Plan(
        lane,
        ((Phase(decode=(0, "peft")), Phase(insert=(0, "diffusers"), steps=6), Phase(decode=(0, "diffusers"))),
         (Phase(steps=3), Phase(decode=(1, "kohya")))),
        resumed=(Place("kohya", 1, 1),),
    )  # fmt: skip
    images = {image.task_id: image.pixels for image in sd.execute(third, jobs, tick.parked).wait()}
    assert images.keys() == alone.keys()
    for name, pixels in images.items():
        np.testing.assert_array_equal(pixels, alone[name])


def test_more_loras_than_a_device_has_entries_take_turns_and_those_that_are_there_are_not_sent_again(sd):
    sd.reset()
    kinds = [[("kohya", weight / 10)] for weight in range(1, 13)]
    assert len(kinds) > 1 + 2 + 3
    jobs = [ask(sd, str(i), kind) for i, kind in enumerate(kinds)]
    alone = [run_alone(sd, job, 0, 0, [6]).pixels for job in jobs]
    sd.reset()
    before = sd.bank.fills
    together = generate(sd, [dataclasses.replace(jobs[i % 12], task_id=str(i)) for i in range(36)], steps_per_tick=2)
    for i, image in enumerate(together):
        np.testing.assert_array_equal(image.pixels, alone[i % 12])
    assert sd.bank.fills > before + 12
    before = sd.bank.fills
    for slot in (0, 1, 0, 1, 1):
        run_alone(sd, jobs[0], 0, slot, [1])
    assert sd.bank.fills <= before + 1


def test_a_hundred_mixed_jobs_trace_nothing(sd):
    kinds: list[Any] = [[], ["kohya"], [("peft", 0.3)], ["diffusers", ("peft", -1)], [("kohya", 0)]]
    before = sd.traces_since_ready
    jobs = [ask(sd, str(i), [*kinds[i % 5]], num_inference_steps=1 + i % 7, seed=i) for i in range(100)]
    images = generate(sd, jobs, steps_per_tick=3)
    assert all(image.finite for image in images)
    assert sd.traces_since_ready == before


def test_a_weight_of_zero_draws_what_a_job_without_loras_draws(sd):
    pixels = [run_alone(sd, ask(sd, "x", loras), 0, 0, [6]).pixels for loras in ([], [("kohya", 0)])]
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_a_file_that_is_added_or_replaced_is_found_without_a_restart(sd, folder):
    with pytest.raises(InvalidRequest, match=r"loras must be of diffusers, kohya, peft \(sdtpu_loras\), got 'added'"):
        ask(sd, "x", ["added"])
    tensors = load_file(folder / "kohya.safetensors")
    save_file(tensors, folder / "added.safetensors")
    try:
        added = run_alone(sd, ask(sd, "x", ["added"]), 0, 0, [6]).pixels
        np.testing.assert_array_equal(added, run_alone(sd, ask(sd, "x", ["kohya"]), 0, 0, [6]).pixels)
        stronger = {name: 2 * array if "lora_up" in name else array for name, array in tensors.items()}
        save_file(stronger, folder / "added.safetensors")
        replaced = run_alone(sd, ask(sd, "x", ["added"]), 0, 0, [6]).pixels
        np.testing.assert_array_equal(replaced, run_alone(sd, ask(sd, "x", [("kohya", 2.0)]), 0, 0, [6]).pixels)
    finally:
        (folder / "added.safetensors").unlink()


def test_names_outside_the_folder_are_not_opened(sd, folder):
    save_file(load_file(folder / "kohya.safetensors"), folder.parent / "outside.safetensors")
    for name in ("../outside", str(folder.parent / "outside"), "kohya.safetensors", "*"):
        with pytest.raises(InvalidRequest, match="loras must be of diffusers, kohya, peft"):
            ask(sd, "x", [name])


def test_ranks_that_add_up_to_more_than_there_is_room_for_are_refused_with_the_numbers(sd):
    text = r"add up to 8 or less \(sdtpu_lora_rank\), got 4 \(kohya\) \+ 4 \(peft\) \+ 4 \(diffusers\) = 12"
    with pytest.raises(InvalidRequest, match=text):
        ask(sd, "x", ["kohya", "peft", "diffusers"])


def _of(module: str, shape: tuple[int, ...], rank: int = RANK) -> dict[str, np.ndarray]:
    up = np.ones((shape[0], rank, *[1] * (len(shape) - 2)), np.float32)
    return {
        f"{module}.lora_down.weight": np.ones((rank, *shape[1:]), np.float32),
        f"{module}.lora_up.weight": up,
    }


_QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (
            _of("lora_unet_down_blocks_0_resnets_0_conv1", (8, 8, 3, 3)),
            r"only a merged LoRA can change: lora_unet_down_blocks_0_resnets_0_conv1;.*sdtpu_loras_merged",
        ),
        (_of("lora_unet_down_blocks_0_resnets_0_time_emb_proj", (8, 32)), "only a merged LoRA can change"),
        ({**_of(_QUERY, (8, 8)), f"{_QUERY}.dora_scale": np.ones((8, 1), np.float32)}, "DoRA"),
        ({f"{_QUERY}.hada_w1_a": np.ones((8, 4), np.float32)}, "LoHa"),
        ({f"{_QUERY}.lokr_w1": np.ones((8, 4), np.float32)}, "LoKr"),
        (_of(_QUERY, (320, 320)), "made for another kind of checkpoint"),
        (_of("lora_te2_text_model_encoder_layers_0_mlp_fc1", (16, 16)), "is the LoRA for another one"),
        ({name: array * np.float32(np.inf) for name, array in _of(_QUERY, (8, 8)).items()}, "values are not finite"),
    ],
)
def test_a_lora_that_cannot_be_used_fails_its_own_job_with_the_reason(sd, folder, tensors, text):
    save_file(tensors, folder / "broken.safetensors")
    try:
        with pytest.raises(InvalidRequest, match=rf"^loras: broken cannot be used: (.|\n)*{text}"):
            ask(sd, "x", ["broken"])
    finally:
        (folder / "broken.safetensors").unlink()


def test_a_pickle_and_half_a_file_are_refused(sd, folder):
    whole = (folder / "kohya.safetensors").read_bytes()
    for data, text in ((b"\x80\x02}q\x00." * 20, "is a pickle"), (whole[:-10], "is not a complete weights file")):
        (folder / "broken.safetensors").write_bytes(data)
        try:
            with pytest.raises(InvalidRequest, match=rf"^loras: broken cannot be used: .*{text}"):
                ask(sd, "x", ["broken"])
        finally:
            (folder / "broken.safetensors").unlink()


def test_a_worker_without_loras_says_so(engine):
    request = GenerationRequest("x", seed=1, loras=(("kohya", 1.0),))
    checkpoint = dataclasses.replace(engine.checkpoint, adapters=None)
    with pytest.raises(InvalidRequest, match=r"loras must be left out: .*sdtpu_loras"):
        prepare_job(checkpoint, engine.info.resolutions, "x", request, None, {})


def test_named_sources_are_opened_at_the_start(sd, folder):
    def load(loras):
        return load_checkpoint(sd.checkpoint.name, options=LoadOptions(loras=loras)).adapters

    assert load({"mine": str(folder / "kohya.safetensors")}).names() == ["mine"]
    with pytest.raises(InvalidCheckpoint, match="sdtpu_loras: there is no file or folder 'nothing'"):
        load({"mine": "nothing"})
    with pytest.raises(ConfigurationError, match=r"sdtpu_loras must be a folder, .*there is no folder 'nothing'"):
        load("nothing")
    tensors = _of("lora_unet_down_blocks_0_resnets_0_conv1", (8, 8, 3, 3))
    save_file(tensors, folder.parent / "locon.safetensors")
    with pytest.raises(InvalidCheckpoint, match="only a merged LoRA can change"):
        load({"mine": str(folder.parent / "locon.safetensors")})


def test_in_bfloat16_jobs_are_the_same_in_any_company_too(sd, devices, compile_cache, folder):
    checkpoint = load_checkpoint(sd.checkpoint.name, jnp.bfloat16, LoadOptions(loras=str(folder), lora_rank=4))
    engine = Engine(checkpoint, devices[:2], 2, None, compile_cache)
    kinds: list[Any] = [[], ["kohya"], [("peft", 0.5)]]
    jobs = [ask(engine, str(i), kinds[i % 3]) for i in range(9)]
    together = generate(engine, jobs, steps_per_tick=2)
    for i in range(3):
        alone = run_alone(engine, jobs[i], 1, 1, [6]).pixels
        for j in range(i, 9, 3):
            np.testing.assert_array_equal(together[j].pixels, alone)


def test_what_sending_loras_costs_is_measured(sd):
    (costs,) = calibrate(sd).costs.values()
    assert costs.cost.adapter_s >= 0
    assert costs.cost.insert_of(0, 1) == costs.cost.insert_s + costs.cost.adapter_s
    assert ask(sd, "x", ["kohya"]).load.adapters == 1
    assert ask(sd, "x").load.adapters == 0
    sd.reset()
