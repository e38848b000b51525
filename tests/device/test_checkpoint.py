"""Checkpoints in msgpack and safetensors; those missing, half-written or of another kind: one clear error each."""

from __future__ import annotations

import fnmatch
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

from benchmarks.peers.flax_checkpoint import rewrite_as_flax, to_flax, write_flax_copy
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.engine_info import describe_jobs
from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.part_files import find_weights, open_part
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint, InvalidRequest
from tests.device.pytorch_layout import rewrite
from tests.support.checkpoints import SHIPPED, make_random_checkpoint


@pytest.fixture
def folder(random_checkpoint, tmp_path):
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def test_a_checkpoint_brings_its_own_size_sampler_and_prediction_type(random_checkpoint, tmp_path):
    own = load_checkpoint(str(random_checkpoint), jnp.bfloat16)
    assert (own.family.default_size, own.defaults.sampler) == ((8, 8), "pndm")
    assert own.schedule.prediction_type == "epsilon"
    assert own.params["unet"]["conv_in.weight"].dtype == jnp.bfloat16
    other = make_random_checkpoint(
        tmp_path / "v", prediction_type="v_prediction", sampler_class="EulerDiscreteScheduler"
    )
    loaded = load_checkpoint(str(other))
    assert (loaded.defaults.sampler, loaded.schedule.prediction_type) == ("euler", "v_prediction")


FEW = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ({}, ("pndm", 50, 7.5, 2)),
        ({"sampler_class": "LCMScheduler"}, ("lcm", 4, 1.0, 1)),
        ({"sampler_class": "LCMScheduler", "unet": {"time_cond_proj_dim": 8}}, ("lcm", 4, 8.5, 1)),
        ({"sampler_class": "EulerAncestralDiscreteScheduler", "scheduler": FEW}, ("euler_ancestral", 4, 1.0, 1)),
        ({"sampler_class": "EulerDiscreteScheduler"}, ("euler", 50, 7.5, 2)),
    ],
)
def test_a_distilled_checkpoint_has_its_own_steps_and_guidance(tmp_path, made, wanted):
    loaded = load_checkpoint(str(make_random_checkpoint(tmp_path / "c", **made)))
    defaults = loaded.defaults
    found = (defaults.sampler, defaults.num_inference_steps, defaults.guidance_scale, loaded.family.rows)
    assert found == wanted


def test_guidance_can_be_left_out_or_asked_for(random_checkpoint, tmp_path):
    off = load_checkpoint(str(random_checkpoint), options=LoadOptions(guidance="off"))
    assert (off.family.rows, off.defaults.guidance_scale) == (1, 1.0)
    with pytest.raises(InvalidRequest, match=r"guidance_scale must be 1 or less: .* \(sdtpu_guidance\), got 7"):
        off.family.make_inputs(off.defaults.fill(GenerationRequest("a", guidance_scale=7)), (8, 8))
    off.family.make_inputs(off.defaults.fill(GenerationRequest("a")), (8, 8))
    lcm = make_random_checkpoint(tmp_path / "lcm", sampler_class="LCMScheduler")
    assert load_checkpoint(str(lcm), options=LoadOptions(guidance="on")).family.rows == 2
    told = make_random_checkpoint(tmp_path / "told", sampler_class="LCMScheduler", unet={"time_cond_proj_dim": 8})
    with pytest.raises(ConfigurationError, match="sdtpu_guidance must be auto or off"):
        load_checkpoint(str(told), options=LoadOptions(guidance="on"))


def test_a_model_that_is_told_the_guidance_scale_follows_it_without_a_negative_prompt(random_checkpoint, tmp_path):
    told = make_random_checkpoint(tmp_path / "told", sampler_class="LCMScheduler", unet={"time_cond_proj_dim": 8})
    loaded = [load_checkpoint(str(told)), *(
        load_checkpoint(str(random_checkpoint), options=LoadOptions(guidance=guidance)) for guidance in ("auto", "off")
    )]  # fmt: skip
    served = [describe_jobs(checkpoint, has_previews=False) for checkpoint in loaded]
    assert [each.follows_guidance_scale for each in served] == [True, True, False]
    assert [each.takes_negative_prompt for each in served] == [False, True, False]


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "nothing", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(InvalidCheckpoint, match="there is no folder"):
        load_checkpoint(name)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidCheckpoint, match=r"the hub did not give a checkpoint .* check sdtpu_model"):
        load_checkpoint("nobody/has-this")


def fake_hub(monkeypatch, source: Path, target: Path) -> list[str]:
    """Replace the hub by a folder; return the list that fills with what is downloaded."""
    downloaded: list[str] = []

    def snapshot_download(name, revision, allow_patterns):
        assert (name, revision) == ("owner/name", "bf16")
        for path in source.rglob("*"):
            file = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / file)
                downloaded.append(path.name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return downloaded


def test_a_hub_checkpoint_with_flax_weights_is_downloaded_without_the_other_formats(monkeypatch, folder, tmp_path):
    rewrite_as_flax(folder)
    for name in ("unet/diffusion_pytorch_model.bin", "tokenizer/a.bin", "tokenizer/a.safetensors"):
        (folder / name).write_bytes(b"")
    downloaded = fake_hub(monkeypatch, folder, tmp_path / "hub")
    assert load_checkpoint("owner/name", options=LoadOptions(revision="bf16")).name == "owner/name"
    assert [name for name in downloaded if name.endswith((".bin", ".safetensors"))] == []


@pytest.mark.parametrize("variant", ["", "fp16", "bf16"])
def test_a_hub_checkpoint_without_flax_weights_is_downloaded_as_safetensors(monkeypatch, folder, tmp_path, variant):
    rewrite(folder, variant=variant)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")
    if not variant:
        shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae" / "other.fp16.safetensors")
    downloaded = fake_hub(monkeypatch, folder, tmp_path / "hub")
    load_checkpoint("owner/name", options=LoadOptions(revision="bf16"))
    weights = sorted({name for name in downloaded if name.endswith((".bin", ".safetensors", ".msgpack"))})
    dot = f".{variant}" if variant else ""
    assert weights == [f"diffusion_pytorch_model{dot}.safetensors", f"model{dot}.safetensors"]


@pytest.mark.parametrize("change", [{"shards": 3}, {"variant": "fp32"}], ids=str)
def test_a_hub_checkpoint_in_several_files_or_another_variant_is_downloaded(monkeypatch, folder, tmp_path, change):
    own = load_checkpoint(str(folder))
    rewrite(folder, **change)
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"not read")
    downloaded = fake_hub(monkeypatch, folder, tmp_path / "hub")
    assert_same_params(load_checkpoint("owner/name", options=LoadOptions(revision="bf16")).params, own.params)
    assert "diffusion_flax_model.msgpack" not in downloaded


def assert_same_params(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda leaf: leaf.dtype, one) == jax.tree.map(lambda leaf: leaf.dtype, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_of_flax_give_the_same_parameters(folder, dtype):
    own = load_checkpoint(str(folder), dtype)
    rewrite_as_flax(folder)
    assert_same_params(load_checkpoint(str(folder), dtype).params, own.params)


@pytest.mark.parametrize(
    "change", [{"old_attention": True}, {"without_prefix": True}, {"shards": 3}, {"variant": "fp16"}], ids=str
)
@pytest.mark.parametrize("xl", [False, True])
def test_every_way_to_write_safetensors_gives_the_same_parameters(
    random_checkpoint, random_xl_checkpoint, tmp_path, change, xl
):
    folder = Path(shutil.copytree(random_xl_checkpoint if xl else random_checkpoint, tmp_path / "checkpoint"))
    own = load_checkpoint(str(folder))
    rewrite(folder, **change)
    assert_same_params(load_checkpoint(str(folder)).params, own.params)


def test_the_copy_of_the_shipped_checkpoint_that_diffusers_flax_pipeline_reads_is_the_same(tmp_path):
    """The benchmark's peers run on it."""
    write_flax_copy(SHIPPED, tmp_path / "flax")
    assert json.loads((tmp_path / "flax" / "unet" / "config.json").read_text())["_class_name"].startswith("Flax")
    assert not list((tmp_path / "flax").rglob("*.safetensors"))
    assert_same_params(load_checkpoint(str(tmp_path / "flax")).params, load_checkpoint("embedded").params)


def test_the_safety_checker_from_weights_of_flax(tmp_path):
    folder = make_random_checkpoint(tmp_path / "checked", safety_checker=True)
    own = load_checkpoint(str(folder))
    rewrite_as_flax(folder)
    assert_same_params(load_checkpoint(str(folder)).safety_checker.params, own.safety_checker.params)


def test_bfloat16_safetensors(folder):
    own = load_checkpoint(str(folder), jnp.bfloat16)
    rewrite(folder, dtype=jnp.bfloat16)
    assert_same_params(load_checkpoint(str(folder), jnp.bfloat16).params, own.params)
    assert load_checkpoint(str(folder)).params["unet"]["conv_in.weight"].dtype == np.float32


def test_a_file_that_is_missing_of_several(folder):
    rewrite(folder, shards=3)
    assert find_weights(folder, "unet").name == "diffusion_pytorch_model.safetensors.index.json"
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"00002-of-00003.safetensors is not a complete .* \(missing\)"):
        load_checkpoint(str(folder))


def test_surplus_tensors_that_change_nothing_are_left_out(folder):
    own = load_checkpoint(str(folder))
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors |= {"logit_scale": np.zeros((), np.float32), "text_projection.weight": np.zeros((3, 32), np.float32)}
    save_file(tensors, path)
    assert_same_params(load_checkpoint(str(folder)).params, own.params)


def test_a_value_that_is_not_finite_is_named(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][3] = np.nan
    save_file(tensors, path)
    with pytest.raises(InvalidCheckpoint, match=r"NaN or infinity in conv_in\.bias as float32"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_cannot_name_other_files(folder, name):
    rewrite(folder, shards=2)
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(InvalidCheckpoint, match=r"may only name \.safetensors files beside it"):
        load_checkpoint(str(folder))


def test_flax_weights_that_transformers_wrote_as_safetensors(folder):
    own = load_checkpoint(str(folder))
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    nested = to_flax(load_file(path))
    flat = {
        ".".join(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(nested)
    }  # fmt: skip
    save_file(flat, path, {"format": "flax"})
    assert_same_params(load_checkpoint(str(folder)).params, own.params)


def test_safetensors_are_preferred_to_msgpack(folder):
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"not read")
    load_checkpoint(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_half_written_weights(folder, part, keep):
    rewrite_as_flax(folder)
    (path,) = (folder / part).glob("*.msgpack")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidCheckpoint, match=f"{part}.*not a complete weights file"):
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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet", {"sample_size": None}),
        ("unet", {"sample_size": "x"}),
        ("vae", {"block_out_channels": 7}),
        ("vae", {"block_out_channels": None}),
        ("text_encoder", {"max_position_embeddings": "x"}),
        ("text_encoder", {"max_position_embeddings": 2}),
        ("text_encoder", {"hidden_size": None}),
        ("scheduler", {"num_train_timesteps": None}),
        ("scheduler", {"num_train_timesteps": 0}),
        ("scheduler", {"num_train_timesteps": 10**12}),
        ("scheduler", {"num_train_timesteps": 10**400}),
        ("scheduler", {"beta_start": "x"}),
        ("scheduler", {"trained_betas": ["x"]}),
    ],
)
def test_a_config_that_says_nonsense(folder, name, change):
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InvalidCheckpoint, match=r"cannot be used|must be"):
        load_checkpoint(str(folder))


def test_a_config_that_is_nested_without_end(folder):
    (folder / "unet" / "config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidCheckpoint, match="cannot be read as JSON"):
        load_checkpoint(str(folder))


def test_a_tokenizer_that_is_missing(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InvalidCheckpoint, match="tokenizer cannot be used"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_half_written_safetensors(folder, keep):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidCheckpoint, match=r"vae/diffusion_pytorch_model.safetensors is not a complete weights"):
        load_checkpoint(str(folder))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused_with_the_remedy(folder, tmp_path, suffix):
    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()
    path.with_name(f"diffusion_pytorch_model{suffix}").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InvalidCheckpoint, match=rf"unet has no weights .*\(found diffusion_pytorch_model{suffix}\)"
                       r".* it reads diffusion_pytorch_model.safetensors, .*safe_serialization=True"):  # fmt: skip
        load_checkpoint(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["diffusion_flax_model.msgpack", "diffusion_pytorch_model.safetensors"])
def test_a_pickle_under_another_name_is_refused_and_never_run(folder, tmp_path, name, protocol):
    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()
    path.with_name(name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol))
    with pytest.raises(InvalidCheckpoint, match="is a pickle, whatever its name says" if protocol >= 2 else name):
        load_checkpoint(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_zip_of_pytorch_under_another_name_is_refused(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InvalidCheckpoint, match="is a pickle"):
        load_checkpoint(str(folder))


def test_msgpack_cannot_smuggle_in_objects(folder):
    from flax.serialization import _MsgpackExtType
    from msgpack import ExtType, packb

    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()
    path = path.with_name("diffusion_flax_model.msgpack")
    array = ExtType(_MsgpackExtType.ndarray, packb(((1,), "object", bytes(8))))
    path.write_bytes(packb({"conv_in": {"kernel": array}}))
    with pytest.raises(InvalidCheckpoint, match="not a complete weights file"):
        load_checkpoint(str(folder))


def test_a_single_file_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "sd.ckpt").write_bytes(b"")
    with pytest.raises(InvalidCheckpoint, match=r"must be a folder .*got the file .*from_single_file"):
        load_checkpoint(str(tmp_path / "sd.ckpt"))


@pytest.mark.parametrize("layout", ["flax", "pytorch"])
def test_tensors_that_are_missing_or_unexpected_or_of_another_kind_are_named(tmp_path, layout):
    shapes = {"conv_in.weight": (2, 3), "conv_in.other": (2, 3), "conv_in.counts": (2, 3), "norm.weight": (4,)}
    found: dict[str, Any] = {
        "conv_in.weight": np.zeros((3, 3), np.float32),
        "conv_in.more": np.zeros(1, np.float32),
        "conv_in.counts": np.zeros((2, 3), np.int8),
        "norm.weight": np.zeros(4, np.float32),
    }
    (tmp_path / "unet").mkdir()
    if layout == "flax":
        (tmp_path / "unet" / "diffusion_flax_model.msgpack").write_bytes(msgpack_serialize(to_flax(found)))
    else:
        save_file(found, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InvalidCheckpoint) as caught:
        read_weights(open_part(tmp_path, "unet"), shapes, np.float32)
    assert (
        "(missing: conv_in.other; unexpected: conv_in.more; of another shape: conv_in.weight ((3, 3), the config makes"
        " it (3, 2)); not floating point: conv_in.counts (int8))"
    ) in str(caught.value)


def test_a_checkpoint_of_another_kind(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match="must name CLIPTextModel as text_encoder, got T5EncoderModel"):
        load_checkpoint(str(folder))


def test_an_inpainting_unet(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(InvalidCheckpoint, match=r"conv_in.weight \(\(32, 4, 3, 3\), the config makes it \(32, 9, 3, 3"):
        load_checkpoint(str(folder))
    with pytest.raises(ConfigurationError, match=r"sdtpu_image_inputs must be on .*its UNet sees a picture"):
        load_checkpoint(str(folder), options=LoadOptions(image_inputs=False))
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 7}))
    with pytest.raises(InvalidCheckpoint, match=r"in_channels .* must be 4, .* 8 .* or 9 .*, got 7"):
        load_checkpoint(str(folder))


def test_weights_that_do_not_fit_the_config(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 96]}))
    with pytest.raises(InvalidCheckpoint, match=r"unet.*do not fit the config .*of another shape: .* and \d+ more"):
        load_checkpoint(str(folder))


def test_a_config_that_makes_no_model(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [30, 64]}))
    with pytest.raises(InvalidCheckpoint, match=r"norm_num_groups must divide each of block_out_channels"):
        load_checkpoint(str(folder))


def test_the_shipped_checkpoint_is_small_and_whole():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 12e6
    checkpoint: Any = load_checkpoint("embedded")
    assert checkpoint.family.default_size == (64, 64)
    tokenizer = checkpoint.family.tokenizer
    ids, truncated = tokenizer.encode(["a red circle on the left of a blue background"])
    assert ((ids != tokenizer.pad_id).sum(), truncated) == (11, False), "the end is the padding too"
