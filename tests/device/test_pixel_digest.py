"""The reuse key: whatever decides the bytes of an image changes it, and nothing else does.

A field of a request, of a prepared job or of the settings that has no decision here fails a test: decide it.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.aggregator.jobs import Load
from sdtpu_worker.config import Config
from sdtpu_worker.contract import request as requests
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import Checkpoint, LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.pixel_digest import digest_weights, pixel_digests
from sdtpu_worker.diffusion.preparation import ControlPicture, PreparedJob, prepare_job
from sdtpu_worker.reuse.reuse_key import Maker, reuse_key
from tests.support.adapter_cases import lora_tensors
from tests.support.checkpoints import make_random_checkpoint, make_random_controlnet
from tests.support.picture_cases import CONTROLNETS, MODELS, SIZE

LANES = {(8, 8): "a fingerprint", (16, 16): "that of another lane"}
MAKER = Maker("sdtpu_worker 1, Pillow 2", "a model")
GREY, SAME_GREY, WHITE, LARGE = "redis:grey", "redis:same-grey", "redis:white", "redis:large"
PIXELS = {
    GREY: np.full((SIZE, SIZE, 3), 100, np.uint8),
    SAME_GREY: np.full((SIZE, SIZE, 3), 100, np.uint8),
    WHITE: np.full((SIZE, SIZE, 3), 255, np.uint8),
    LARGE: np.full((16, 16, 3), 100, np.uint8),
}


def write_model(folder: Path) -> Path:
    """Write a tiny checkpoint with two ControlNets, and with two LoRAs in a folder."""
    make_random_checkpoint(folder, unet=dict(MODELS["control"]), sampler_class="DDIMScheduler")
    for name in ("edges", "pose"):
        make_random_controlnet(folder / f"controlnet-{name}", CONTROLNETS["control"], name)
    (folder / "loras").mkdir()
    shapes = {part: {name: array.shape for path in (folder / part).glob("*.safetensors")
                     for name, array in load_file(path).items()} for part in ("unet", "text_encoder")}  # fmt: skip
    for layout in ("kohya", "peft"):
        save_file(lora_tensors(layout, shapes), folder / "loras" / f"{layout}.safetensors")
    return folder


def load(folder: Path, **options: Any) -> Checkpoint:
    controlnets = {name: str(folder / f"controlnet-{name}") for name in ("edges", "pose")}
    options = {"controlnets": controlnets, "loras": str(folder / "loras"), "lora_rank": 8, **options}
    return load_checkpoint(str(folder), options=LoadOptions(**options))


@pytest.fixture(scope="module")
def folder(devices, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("digest") / "model")


class Keys(NamedTuple):
    """Makes the keys of jobs that a checkpoint draws."""

    checkpoint: Checkpoint
    digests: Any

    def job(self, **asked: Any) -> tuple[GenerationRequest, PreparedJob]:
        request = GenerationRequest(**{"prompt": "a red circle", "seed": 7, "num_inference_steps": 4, **asked})
        pictures: dict[str, Any] = {}
        if request.image:
            pictures["image"] = PIXELS[request.image]
        if request.mask_image:
            pictures["mask_image"] = PIXELS[request.mask_image][..., 0] > 128
        if request.control_image:
            pictures["control_image"] = [PIXELS[uri] for uri in request.control_image]
        return request, prepare_job(self.checkpoint, LANES, "a task", request, None, pictures)

    def key(self, maker: Maker = MAKER, group: str = "tenant None", **asked: Any) -> str:
        request, job = self.job(**asked)
        return reuse_key(self.digests(job), request, job.parameters, job.lane, maker, group)


@pytest.fixture(scope="module")
def keys(folder) -> Keys:
    checkpoint = load(folder)
    return Keys(checkpoint, pixel_digests(checkpoint, LANES))


@pytest.fixture(scope="module")
def keys_of(devices, keys, tmp_path_factory) -> dict[str, Keys]:
    """Give the keys of each kind of model that has fields of its own."""
    found = {"sd": keys}
    for kind in ("xl", "edit"):
        folder = make_random_checkpoint(
            tmp_path_factory.mktemp("digest") / kind, unet=dict(MODELS[kind]), xl=kind == "xl"
        )
        checkpoint = load_checkpoint(str(folder))
        found[kind] = Keys(checkpoint, pixel_digests(checkpoint, LANES))
    return found


START = {"image": GREY}
MASKED = {"image": GREY, "mask_image": WHITE}
CONTROLLED = {"control_image": [GREY], "controlnet": "edges"}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": ({}, {"prompt": "a blue circle"}),
    "prompt_syntax": ({"prompt": "a (red) circle"}, {"prompt": "a (red) circle", "prompt_syntax": "weighted"}),
    "negative_prompt": ({}, {"negative_prompt": "blurred"}),
    "seed": ({}, {"seed": 8}),
    "num_inference_steps": ({}, {"num_inference_steps": 5}),
    "guidance_scale": ({}, {"guidance_scale": 5.0}),
    "height": ({}, {"height": 16, "width": 16}),
    "width": ({"height": 16, "width": 16}, {"height": 8, "width": 8}),
    "sampler": ({}, {"sampler": "euler"}),
    "image_format": ({}, {"image_format": "jpeg"}),
    "sigmas": ({"sampler": "euler"}, {"sampler": "euler", "sigmas": "karras"}),
    "eta": ({}, {"eta": 0.5}),
    "guidance_rescale": ({}, {"guidance_rescale": 0.7}),
    "clip_skip": ({}, {"clip_skip": 1}),
    "prompt_2": ({}, {"prompt_2": "a fox"}),
    "negative_prompt_2": ({}, {"negative_prompt_2": "a fox"}),
    "original_size": ({}, {"original_size": (8, 9)}),
    "target_size": ({}, {"target_size": (8, 9)}),
    "crops_coords_top_left": ({}, {"crops_coords_top_left": (1, 0)}),
    "image": (START, {"image": WHITE}),
    "strength": (START, {**START, "strength": 0.5}),
    "mask_image": (MASKED, {**MASKED, "mask_image": GREY}),
    "preserve_unmasked": (MASKED, {**MASKED, "preserve_unmasked": False}),
    "image_guidance_scale": (START, {**START, "image_guidance_scale": 2.0}),
    "control_image": (CONTROLLED, {**CONTROLLED, "control_image": [WHITE]}),
    "controlnet": (CONTROLLED, {**CONTROLLED, "controlnet": "pose"}),
    "controlnet_conditioning_scale": (CONTROLLED, {**CONTROLLED, "controlnet_conditioning_scale": 0.5}),
    "control_guidance_start": (CONTROLLED, {**CONTROLLED, "control_guidance_start": 0.5}),
    "control_guidance_end": (CONTROLLED, {**CONTROLLED, "control_guidance_end": 0.5}),
    "loras": ({"loras": ["kohya"]}, {"loras": [("kohya", 0.5)]}),
}
"""By field of the request: what is asked for, and what else gives another key."""
MODEL_OF = {
    **dict.fromkeys(("prompt_2", "negative_prompt_2", "original_size", "target_size", "crops_coords_top_left"), "xl"),
    "image_guidance_scale": "edit",
}
"""The models that take a field which Stable Diffusion 1.x refuses."""


def test_every_field_of_a_request_has_a_decision():
    fields = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert set(CHANGES) == fields
    assert set(requests._ARGUMENT_CHECKS) - fields == {"tenant", "idempotency_key"}, "what is given besides"


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_matters_changes_the_key(keys_of, name):
    keys, (asked, otherwise) = keys_of[MODEL_OF.get(name, "sd")], CHANGES[name]
    assert keys.key(**asked) == keys.key(**asked)
    assert keys.key(**asked) != keys.key(**{**asked, **otherwise})


@pytest.mark.parametrize(
    ("asked", "equal"),
    [
        ({}, {"guidance_scale": 7.5}),
        ({}, {"sampler": "DDIM"}),
        ({}, {"height": 8, "width": 8}),
        ({"num_inference_steps": None}, {"num_inference_steps": 50}),
        ({}, {"negative_prompt": None}),
        ({}, {"seed": "7"}),
        ({"sampler": "euler", "sigmas": "karras"}, {"sampler": "Euler Karras"}),
        (START, {"image": SAME_GREY}),
        (MASKED, {"image": SAME_GREY, "mask_image": WHITE}),
        (CONTROLLED, {**CONTROLLED, "control_image": [SAME_GREY]}),
        ({"loras": ["kohya"]}, {"loras": [("kohya", 1)]}),
    ],
)
def test_other_words_for_the_same_have_the_same_key(keys, asked, equal):
    assert keys.key(**asked) == keys.key(**equal)


def test_tenant_model_and_software_change_the_key(keys):
    changed = [keys.key(group="tenant 'a'"), keys.key(dataclasses.replace(MAKER, model="another"))]
    changed += [keys.key(dataclasses.replace(MAKER, software="sdtpu_worker 2, Pillow 2")), keys.key()]
    assert len(set(changed)) == 4


def test_a_lora_counts_by_its_contents(keys, folder):
    path = folder / "loras" / "kohya.safetensors"
    before, copy = keys.key(loras=["kohya"]), keys.key(loras=["peft"])
    kept = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_up" in name)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] += 1
    save_file(tensors, path)
    assert keys.key(loras=["kohya"]) not in (before, copy)
    path.write_bytes(kept)
    assert keys.key(loras=["kohya"]) == before


ANOTHER: dict[str, Any] = {
    "lane": (16, 16),
    "parameters": {"sampler": "another"},
    "num_steps": 3,
    "inputs": {"ids": np.zeros((2, 77), np.int32)},
    "key_data": np.array([1, 2], np.uint32),
    "guidance_scale": 1.5,
    "guidance_rescale": 0.5,
    "image_guidance_scale": 2.5,
    "first_level": (0.5, 1.0),
    "table": np.ones((1000, 8), np.float32),
    "truncated": True,
    "image": np.zeros((8, 8, 3), np.uint8),
    "mask": np.zeros((8, 8), bool),
    "preserve_unmasked": False,
    "controls": (ControlPicture(0, np.zeros((8, 8, 3), np.uint8), 1.0, 0, 4),),
    "adapters": "those of another job",
}
IRRELEVANT: dict[str, Any] = {"task_id": "another", "load": Load(pictures=3)}


def test_every_field_of_a_prepared_job_counts_but_its_name_and_its_cost(keys):
    assert set(ANOTHER) | set(IRRELEVANT) == {field.name for field in dataclasses.fields(PreparedJob)}
    _, job = keys.job()
    others = {**ANOTHER, "adapters": keys.job(loras=["kohya"])[1].adapters}
    digests = {name: keys.digests(dataclasses.replace(job, **{name: value})) for name, value in others.items()}
    assert len({keys.digests(job), *digests.values()}) == 1 + len(ANOTHER), digests
    for name, value in IRRELEVANT.items():
        assert keys.digests(dataclasses.replace(job, **{name: value})) == keys.digests(job)


def test_what_the_compiler_is_told_counts(keys, monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "--another")
            other = Keys(keys.checkpoint, pixel_digests(keys.checkpoint, LANES))
        assert other.key() != keys.key()
    assert Keys(keys.checkpoint, pixel_digests(keys.checkpoint, LANES)).key() == keys.key()


def test_arrays_of_the_same_bytes_and_another_shape_or_type_differ(keys):
    _, job = keys.job()
    arrays = [np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32), np.zeros(16, np.uint8)]
    digests = {keys.digests(dataclasses.replace(job, inputs={"ids": array})) for array in arrays}
    assert len(digests) == 4
    with pytest.raises(TypeError, match="give them a rule"):
        keys.digests(dataclasses.replace(job, truncated=object()))


def test_one_byte_of_any_weight_counts_and_so_does_a_safety_checker(keys, folder, tmp_path):
    unchanged, same = keys.checkpoint, load(folder)
    assert digest_weights(same) == digest_weights(unchanged)
    weights = {part: dict(arrays) for part, arrays in same.params.items()}
    for part, arrays in weights.items():
        name = max(arrays, key=lambda name: arrays[name].size)
        changed = np.array(arrays[name])
        changed.reshape(-1)[changed.size // 2] += 1
        other = dataclasses.replace(same, params={**same.params, part: {**arrays, name: changed}})
        assert digest_weights(other) != digest_weights(unchanged), part
    assert {"controlnet edges", "controlnet pose"} <= set(weights)
    make_random_checkpoint(tmp_path / "checked", safety_checker=True)
    checked = load_checkpoint(str(tmp_path / "checked"))
    assert digest_weights(checked) != digest_weights(dataclasses.replace(checked, safety_checker=None))
    shutil.rmtree(tmp_path / "checked")


IN_THE_DIGEST = {
    "model", "revision", "tokenizer", "prediction_type", "loras_merged", "loras", "lora_rank", "guidance",
    "image_inputs", "controlnets", "platform", "cpu_devices", "dtype", "slots_per_device", "vae_tiling",
    "embeddings", "prompt_windows", "attention",
}  # fmt: skip
"""Settings that an engine's fingerprint, its weights or the prepared job tell of."""
NOT_IN_IT = {
    "resolutions", "tick_s", "preemption", "reuse", "progress_s", "preview_every", "trace", "queue", "tenant_shards",
    "max_queue", "max_message_bytes", "lease_s", "stall_s", "grace_s", "max_deliveries", "health_address",
    "log_prompts", "log_format", "image_store", "read_image_stores", "http_address", "http_keys", "http_open",
    "http_cors_origins", "http_webhook_origins", "http_webhook_secret", "http_max_body_bytes", "http_wait_s",
    "http_max_streams", "http_metrics_keys", "http_page", "compile_cache", "programs",
    "web_owner", "web_priorities", "web_max_jobs", "web_max_streams", "web_stream_s", "web_page",
}  # fmt: skip
"""Settings that change no pixel; a job's own lane counts, not which others there are."""


def test_every_setting_has_a_decision():
    names = {field.name for field in dataclasses.fields(Config)}
    assert names == IN_THE_DIGEST | NOT_IN_IT
    assert not IN_THE_DIGEST & NOT_IN_IT
