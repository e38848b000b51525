"""Checkpoints that are missing, half-written or of another kind: one clear error each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.errors import InvalidCheckpoint
from tests.checkpoints import SHIPPED, make_random_checkpoint


@pytest.fixture
def folder(random_checkpoint, tmp_path):
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def test_a_checkpoint_brings_its_own_size_sampler_and_prediction_type(random_checkpoint, tmp_path):
    own = load_checkpoint(str(random_checkpoint), jnp.bfloat16)
    assert (own.default_size, own.default_sampler, own.schedule.prediction_type) == ((8, 8), "pndm", "epsilon")
    assert own.params["unet"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    other = make_random_checkpoint(
        tmp_path / "v", prediction_type="v_prediction", sampler_class="EulerDiscreteScheduler"
    )
    loaded = load_checkpoint(str(other))
    assert (loaded.default_sampler, loaded.schedule.prediction_type) == ("euler", "v_prediction")


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "nothing", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(InvalidCheckpoint, match="there is no folder"):
        load_checkpoint(name)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidCheckpoint, match=r"the hub did not give a checkpoint .* check sdtpu_model"):
        load_checkpoint("nobody/has-this")


def test_a_hub_name_is_loaded_from_its_snapshot(monkeypatch, random_checkpoint):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(random_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_checkpoint("owner/name", revision="bf16").name == "owner/name"
    assert asked == {"name": "owner/name", "revision": "bf16"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_half_written_weights(folder, part, keep):
    (path,) = (folder / part).glob("*.msgpack")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidCheckpoint, match=f"{part}.*not a complete Flax weights file"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configs_that_are_missing_or_broken(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(InvalidCheckpoint, match="cannot be read as JSON"):
        load_checkpoint(str(folder))
    (folder / name).write_text("[]")
    with pytest.raises(InvalidCheckpoint, match="must hold a JSON object"):
        load_checkpoint(str(folder))
    (folder / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"{name} is missing"):
        load_checkpoint(str(folder))


def test_a_tokenizer_that_is_missing(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InvalidCheckpoint, match="tokenizer cannot be used"):
        load_checkpoint(str(folder))


def test_pytorch_weights_are_refused_with_the_remedy(folder):
    (path,) = (folder / "unet").glob("*.msgpack")
    path.rename(path.with_name("diffusion_pytorch_model.safetensors"))
    with pytest.raises(InvalidCheckpoint, match=r"missing \(found diffusion_pytorch_model.safetensors\).*from_pt=True"):
        load_checkpoint(str(folder))


def test_a_checkpoint_of_another_kind(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match="must name CLIPTextModel as text_encoder, got T5EncoderModel"):
        load_checkpoint(str(folder))


def test_an_inpainting_unet(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(InvalidCheckpoint, match="takes 9 channels and the VAE has 4; inpainting"):
        load_checkpoint(str(folder))


def test_weights_that_do_not_fit_the_config(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 96]}))
    with pytest.raises(InvalidCheckpoint, match="the parameters do not fit the configs"):
        Engine(load_checkpoint(str(folder)), pytest.devices[:1])


def test_the_shipped_checkpoint_is_small_and_whole():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 12e6
    checkpoint = load_checkpoint("embedded")
    assert checkpoint.default_size == (64, 64)
    ids = checkpoint.tokenizer("a red circle on the left of a blue background").input_ids
    assert len(ids) == 12
