"""Jobs that start from a picture, against PyTorch's pipelines (`tools/oracle/pictures.py`), and beside other jobs."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtpu_worker.aggregator.plan import Phase
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.offline import generate
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.errors import InvalidCheckpoint, InvalidRequest, SnapshotMismatch
from tests.device.pytorch_layout import rewrite
from tests.support import picture_cases
from tests.support.checkpoints import make_random_checkpoint, make_random_controlnet
from tests.support.engines import on_one_device, prepare_with_scheduler, run_alone
from tests.support.picture_cases import MODELS, SIZE, make_image, make_mask

GOLDEN = Path(__file__).parent / "golden"
CASES = picture_cases.cases()
NAMED = "redis:sdtpu:image:x"


@pytest.fixture(scope="module")
def golden() -> np.ndarray:
    with np.load(GOLDEN / "pictures.npz") as file:
        pixels = file["pixels"]
    assert len(pixels) == len(CASES), "run tools/oracle/pictures.py again: the cases have changed"
    return pixels


def make_engine(model, devices, compile_cache, folder, slots=4) -> Engine:
    is_xl, is_tiny = model.startswith("xl"), model == "tiny vae"
    make_random_checkpoint(folder, xl=is_xl, tiny_vae=is_tiny, unet=dict(MODELS[model]))
    controlnets = {}
    if model in picture_cases.CONTROLNETS:
        for name in picture_cases.CONTROL_NAMES:
            config = picture_cases.CONTROLNETS[model]
            controlnets[name] = str(make_random_controlnet(folder / f"controlnet-{name}", config, name))
    checkpoint = load_checkpoint(str(folder), options=LoadOptions(controlnets=controlnets))
    return Engine(checkpoint, devices[:2], slots, None, compile_cache)


@pytest.fixture(scope="module")
def sd(devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine("sd", devices, compile_cache, tmp_path_factory.mktemp("pictures") / "sd", slots=2)


def prepare_case(engine: Engine, number: int) -> PreparedJob:
    case = CASES[number]
    pictures: dict[str, Any] = {}
    names: dict[str, Any] = {}
    if case.image is not None:
        pictures["image"], names["image"] = make_image(case.image), NAMED
    if case.controls:
        pictures["control_image"] = [make_image(each) for each in case.controls.values()]
        names |= {"control_image": [NAMED] * len(case.controls), "controlnet": list(case.controls)}
    if case.mask is not None:
        pictures["mask_image"], names["mask_image"] = make_mask(case.mask), NAMED
    request = GenerationRequest(**case.request, **names, seed=picture_cases.SEED, preserve_unmasked=False)
    return prepare_with_scheduler(engine, case.scheduler, str(number), request, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_pictures_are_those_of_pytorchs_pipelines(model, devices, compile_cache, golden, tmp_path):
    engine = make_engine(model, devices, compile_cache, tmp_path / "checkpoint")
    numbers = [i for i, case in enumerate(CASES) if case.model == model]
    images = generate(engine, [prepare_case(engine, i) for i in numbers], steps_per_tick=5)
    wrong = []
    for i, image in zip(numbers, images, strict=True):
        error = np.abs(image.pixels.astype(int) - golden[i])
        if error.max() > 2 or np.mean(error**2) > 255**2 / 10**5.5:  # 55 dB
            wrong.append((error.max(), str(CASES[i])))
    assert not wrong, f"{len(wrong)} of {len(numbers)}: {wrong[:5]}"


def ask(engine: Engine, task_id: str, image: int | None = None, mask: int | None = None, **parameters) -> PreparedJob:
    given = {} if image is None else {"image": make_image(image)}
    if mask is not None:
        given["mask_image"] = make_mask(mask)
    asked: dict[str, Any] = {"num_inference_steps": 6, "seed": 5, **parameters, **dict.fromkeys(given, NAMED)}
    request = GenerationRequest("a red circle", **asked)
    return engine.prepare(task_id, request, given)


def test_every_kind_of_job_draws_the_same_pixels_alone_and_in_any_company(sd):
    kinds: list[dict[str, Any]] = [
        {},
        {"image": 0, "strength": 0.5},
        {"image": 1, "strength": 0.5, "sampler": "euler_ancestral"},
        {"image": 1, "mask": 1, "sampler": "dpmsolver++"},
        {"image": 2, "mask": 2, "strength": 0.7, "num_inference_steps": 9},
        {"sampler": "heun", "seed": 6},
    ]
    jobs = [ask(sd, str(i), **kind) for i, kind in enumerate(kinds * 4)]
    together = {image.task_id: sd_finish(jobs, image) for image in generate(sd, jobs, steps_per_tick=2)}
    for i, kind in enumerate(kinds):
        job = ask(sd, "alone", **kind)
        for device, slot in ((0, 1), (1, 0)):
            alone = job.finish(run_alone(sd, job, device, slot, [1] * job.num_steps).pixels)
            for j in range(i, len(jobs), len(kinds)):
                np.testing.assert_array_equal(together[str(j)], alone)
    pictures = [together[str(i)].tobytes() for i in range(len(kinds))]
    assert len(set(pictures)) == len(kinds)
    assert sd.traces_since_ready == 0


def sd_finish(jobs, image) -> np.ndarray:
    (job,) = (each for each in jobs if each.task_id == image.task_id)
    return job.finish(image.pixels)


def test_what_the_mask_does_not_cover_has_the_images_own_pixels(sd):
    mask, image = make_mask(1), make_image(0)
    kept = ask(sd, "kept", image=0, mask=1)
    (drawn,) = generate(sd, [kept])
    np.testing.assert_array_equal(kept.finish(drawn.pixels)[~mask], image[~mask])
    np.testing.assert_array_equal(kept.finish(drawn.pixels)[mask], drawn.pixels[mask])
    assert (drawn.pixels[~mask] != image[~mask]).any(), "so there was something to preserve"
    decoded = ask(sd, "decoded", image=0, mask=1, preserve_unmasked=False)
    np.testing.assert_array_equal(decoded.finish(drawn.pixels), drawn.pixels)


def test_a_job_with_a_mask_parks_and_resumes_bit_for_bit_and_no_other_job_resumes_from_it(sd):
    job = ask(sd, "job", image=2, mask=2, num_inference_steps=8)
    whole = run_alone(sd, job, 0, 0, [8]).pixels
    run_alone(sd, job, 0, 1, [3])
    data = sd.snapshot(job.lane, 0, 1).to_bytes()
    sd.reset()
    sd.restore(job.lane, 1, 0, sd.read_snapshot(data, job))
    rest = run_rest(sd, job, 1, 0, 5)
    np.testing.assert_array_equal(rest, whole)
    for other in ({"image": 2, "mask": 1}, {"image": 2}, {}):
        with pytest.raises(SnapshotMismatch):
            sd.read_snapshot(data, ask(sd, "job", num_inference_steps=8, **other))


def run_rest(engine, job, device, slot, steps) -> np.ndarray:
    engine.execute(on_one_device(engine, job.lane, device, Phase(steps=steps)), {}).wait()
    plan = on_one_device(engine, job.lane, device, Phase(decode=(slot, job.task_id)))
    return engine.execute(plan, {}).wait()[0].pixels


def test_strength_is_the_share_of_the_steps_that_are_taken(sd):
    steps = {s: ask(sd, "x", image=0, strength=s, num_inference_steps=10).num_steps for s in (0.1, 0.35, 0.8, 1.0)}
    assert steps == {0.1: 2, 0.35: 4, 0.8: 9, 1.0: 11}  # PNDM asks once more
    assert ask(sd, "x", image=0, num_inference_steps=10).num_steps == 9
    assert ask(sd, "x", image=0, mask=0, num_inference_steps=10).num_steps == 11
    with pytest.raises(InvalidRequest, match=r"strength must be at least 1 / num_inference_steps, 0\.1, .*got 0\.05"):
        ask(sd, "x", image=0, strength=0.05, num_inference_steps=10)


def test_a_picture_of_another_size_is_refused_with_both_sizes(sd):
    request = GenerationRequest("x", seed=1, image=NAMED, mask_image=NAMED)
    for pictures, text in (
        ({"image": np.zeros((16, 8, 3), np.uint8)}, "height x width must be one of 8x8 .*got 16x8"),
        (
            {"image": np.zeros((8, 8, 3), np.uint8), "mask_image": np.zeros((8, 16), bool)},
            r"mask_image must have the size of the result, 8x8 \(height x width\), got 8x16",
        ),
    ):
        with pytest.raises(InvalidRequest, match=text):
            sd.prepare("x", request, pictures)
    request = GenerationRequest("x", seed=1, image=NAMED, height=8, width=8)
    with pytest.raises(InvalidRequest, match=r"image must have the size of the result, 8x8 .*got 16x16"):
        sd.prepare("x", request, {"image": np.zeros((16, 16, 3), np.uint8)})


def test_a_worker_without_an_encoder_says_so(random_checkpoint):
    family = load_checkpoint(str(random_checkpoint), options=LoadOptions(image_inputs=False)).family
    assert family.picture_use is PictureUse.NONE
    with pytest.raises(InvalidRequest, match=r"image must be left out: .*sdtpu_image_inputs is off"):
        family.make_inputs(GenerationRequest("x", seed=1, image=NAMED), (SIZE, SIZE))


@pytest.mark.parametrize(
    ("model", "given", "text"),
    [
        ("inpainting", {}, "image and mask_image must be given: this worker's checkpoint is for inpainting"),
        ("inpainting", {"image": NAMED}, "image and mask_image must be given"),
        ("edit", {}, "image must be given: this worker's checkpoint changes an image"),
        ("edit", {"image": NAMED, "strength": 0.5}, "strength must be left out"),
        ("edit", {"image": NAMED, "mask_image": NAMED}, "mask_image must be left out"),
        ("sd", {"image": NAMED, "image_guidance_scale": 2.0}, "image_guidance_scale must be left out: only"),
    ],
)
def test_a_model_says_which_pictures_it_needs(model, given, text, tmp_path):
    make_random_checkpoint(tmp_path / "c", unet=dict(MODELS[model]))
    with pytest.raises(InvalidRequest, match=text):
        load_checkpoint(str(tmp_path / "c")).family.make_inputs(GenerationRequest("x", seed=1, **given), (SIZE, SIZE))


@pytest.fixture(scope="module")
def controlled(devices, compile_cache, tmp_path_factory) -> Engine:
    return make_engine("control", devices, compile_cache, tmp_path_factory.mktemp("controls") / "control", slots=2)


def ask_control(engine: Engine, task_id: str, images=(), **parameters) -> PreparedJob:
    named = {"control_image": [NAMED] * len(images)} if images else {}
    asked: dict[str, Any] = {"num_inference_steps": 6, "seed": 5, "sampler": "ddim", **parameters, **named}
    pictures = {"control_image": [make_image(each) for each in images]} if images else {}
    return engine.prepare(task_id, GenerationRequest("a red circle", **asked), pictures)


def test_jobs_with_and_without_controlnets_share_a_batch_and_draw_what_they_draw_alone(controlled):
    kinds: list[dict[str, Any]] = [
        {},
        {"images": (3,), "controlnet": "edges"},
        {"images": (3,), "controlnet": "pose"},
        {"images": (4, 3), "controlnet": ["pose", "edges"], "controlnet_conditioning_scale": 0.5},
        {"images": (5,), "controlnet": "edges", "control_guidance_start": 0.5, "num_inference_steps": 8},
        {"images": (3,), "controlnet": "pose", "negative_prompt": "star BREAK (black)", "prompt_syntax": "weighted"},
    ]
    jobs = [ask_control(controlled, str(i), **kind) for i, kind in enumerate(kinds * 4)]
    together = {image.task_id: image.pixels for image in generate(controlled, jobs, steps_per_tick=2)}
    for i, kind in enumerate(kinds):
        job = ask_control(controlled, "alone", **kind)
        alone = run_alone(controlled, job, 1, 1, [1] * job.num_steps).pixels
        for j in range(i, len(jobs), len(kinds)):
            np.testing.assert_array_equal(together[str(j)], alone)
    assert len({together[str(i)].tobytes() for i in range(len(kinds))}) == len(kinds)
    assert [jobs[i].load.controls for i in range(4)] == [set(), {0}, {1}, {0, 1}]
    assert controlled.traces_since_ready == 0


def test_a_job_with_a_controlnet_resumes_bit_for_bit(controlled):
    job = ask_control(controlled, "job", (3,), controlnet="edges", num_inference_steps=8)
    whole = run_alone(controlled, job, 0, 0, [8]).pixels
    run_alone(controlled, job, 0, 1, [3])
    data = controlled.snapshot(job.lane, 0, 1).to_bytes()
    controlled.reset()
    controlled.restore(job.lane, 1, 0, controlled.read_snapshot(data, job))
    np.testing.assert_array_equal(run_rest(controlled, job, 1, 0, 5), whole)
    for other in ({"images": (3,), "controlnet": "pose"}, {}):
        with pytest.raises(SnapshotMismatch):
            controlled.read_snapshot(data, ask_control(controlled, "job", **{"num_inference_steps": 8, **other}))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"images": (3,)}, "controlnet must say which of edges, pose is meant, got none"),
        ({"images": (3,), "controlnet": "depth"}, r"controlnet must be of edges, pose .*got 'depth'"),
        ({"controlnet": "pose"}, r"control_image must be one picture for each ControlNet \(pose\), got 0"),
        ({"images": (3, 4), "controlnet": "pose"}, "control_image must be one picture for each ControlNet"),
        (
            {"images": (3,), "controlnet": "pose", "control_guidance_end": [0.5, 1.0]},
            "control_guidance_end must be one number, or 1, one for each ControlNet, got 2",
        ),
    ],
)
def test_a_controlnet_that_is_not_there_is_refused_with_those_that_are(controlled, given, text):
    with pytest.raises(InvalidRequest, match=text):
        ask_control(controlled, "x", **given)


def test_a_worker_without_controlnets_says_so(sd):
    with pytest.raises(InvalidRequest, match=r"control_image must be left out: .*sdtpu_controlnets"):
        ask_control(sd, "x", (3,))


def test_what_controlnets_and_pictures_cost_is_measured(controlled):
    (costs,) = calibrate(controlled).costs.values()
    assert len(costs.cost.control_s) == 2
    assert costs.cost.step_s > 0
    controlled.reset()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cross_attention_dim": 48}, "edges .* is for another UNet: cross_attention_dim must be 32, .*got 48"),
        ({"block_out_channels": [8, 8]}, r"block_out_channels must be \[8, 16\], .*got \[8, 8\]"),
        ({"conditioning_embedding_out_channels": [4]}, "must be 2 pixels per latent, .*got 1"),
        ({"global_pool_conditions": 3}, "global_pool_conditions must be"),
        ({"a_new_key": 3}, "a_new_key"),
    ],
)
def test_a_controlnet_of_another_model_is_refused_at_the_start(tmp_path, changes, text):
    make_random_checkpoint(tmp_path / "c", unet=dict(MODELS["control"]))
    folder = make_random_controlnet(tmp_path / "edges", picture_cases.CONTROLNETS["control"], "edges")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InvalidCheckpoint, match=text):
        load_checkpoint(str(tmp_path / "c"), options=LoadOptions(controlnets={"edges": str(folder)}))


def test_a_controlnet_that_is_no_folder_is_refused_with_the_remedy(tmp_path):
    make_random_checkpoint(tmp_path / "c", unet=dict(MODELS["control"]))
    (tmp_path / "canny.safetensors").write_bytes(b"x")
    for source, text in (
        (str(tmp_path / "canny.safetensors"), "must be a folder in the diffusers layout"),
        (str(tmp_path / "nowhere"), "must be a folder in the diffusers layout"),
        (str(tmp_path), "config.json cannot be read as JSON"),
    ):
        with pytest.raises(InvalidCheckpoint, match=text):
            load_checkpoint(str(tmp_path / "c"), options=LoadOptions(controlnets={"edges": source}))


@pytest.mark.parametrize("change", [{}, {"variant": "bf16"}, {"variant": "fp16", "shards": 2}], ids=str)
def test_a_controlnet_of_a_hub_is_downloaded_in_any_variant_and_without_a_pickle(monkeypatch, tmp_path, change):
    make_random_checkpoint(tmp_path / "c", unet=dict(MODELS["control"]))
    source = make_random_controlnet(tmp_path / "hub" / "unet", picture_cases.CONTROLNETS["control"], "edges")
    options = LoadOptions(controlnets={"edges": str(source)})
    own = load_checkpoint(str(tmp_path / "c"), options=options).params["controlnet edges"]
    rewrite(tmp_path / "hub", **change)
    (source / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")

    def snapshot_download(name, revision, allow_patterns):
        assert (name, revision) == ("owner/name", "main")
        target = tmp_path / "cache"
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    options = LoadOptions(controlnets={"edges": "owner/name"})
    params = load_checkpoint(str(tmp_path / "c"), options=options).params["controlnet edges"]
    assert params.keys() == own.keys()
    for name, array in own.items():
        np.testing.assert_array_equal(params[name], array)
    assert not (tmp_path / "cache" / "diffusion_pytorch_model.bin").exists()
