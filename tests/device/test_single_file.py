"""Checkpoints in one file, in the original layout: the same parameters as from a folder, everything accounted for."""

from __future__ import annotations

import gzip
import json
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.original_names import autoencoder_name, unet_names
from sdtpu_worker.diffusion.single_file_configs import CONFIGS
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_autoencoder_config, read_clip_text_config, read_unet_config
from sdtpu_worker.models.layout import pytorch_shape
from tests.device.original_layout import tiny_architecture, to_single_file
from tests.support.checkpoints import SHIPPED
from tests.support.single_file_cases import UNETS, VAE

OPTIONS = LoadOptions(tokenizer=str(SHIPPED / "tokenizer"))
SD1, SD2, XL = CONFIGS


@pytest.fixture(scope="module")
def golden():
    return json.loads(gzip.decompress((Path(__file__).parent / "golden" / "original-names.json.gz").read_bytes()))


@pytest.mark.parametrize("name", UNETS)
def test_the_names_of_a_unet_are_those_of_the_original_code(golden, name):
    names = unet_names(networks.unet(read_unet_config(UNETS[name])).shapes)
    assert names == golden[name]


def test_the_names_of_an_autoencoder_are_those_of_the_original_code(golden):
    config = read_autoencoder_config(VAE)
    shapes = {**networks.decoder(config).shapes, **networks.encoder(config).shapes}
    assert {autoencoder_name(name, 4): name for name in shapes} == golden["vae"]


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        (SD1, (859_520_964, 83_653_863, 123_060_480)),
        (SD2, (865_910_724, 83_653_863, 340_387_840)),
        (XL, (2_567_463_684, 83_653_863, 123_060_480, 694_659_840)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_the_architectures_are_those_of_the_published_checkpoints(architecture, counts):
    unet = networks.unet(read_unet_config(architecture.configs["unet"])).shapes
    vae_config = read_autoencoder_config(architecture.configs["vae"])
    vae = {**networks.decoder(vae_config).shapes, **networks.encoder(vae_config).shapes}
    texts = [
        networks.text_encoder(read_clip_text_config(config), projection=part == "text_encoder_2").shapes
        for part, config in architecture.configs.items()
        if part.startswith("text")
    ]
    assert tuple(sum(map(prod, shapes.values())) for shapes in (unet, vae, *texts)) == counts
    names = unet_names(unet)
    for sign, shape in architecture.signs.items():
        today = names[sign.removeprefix("model.diffusion_model.")]
        assert pytorch_shape(today, unet[today]) == shape


@pytest.fixture(params=["sd1", "sd2", "xl"])
def case(request, random_checkpoint, random_xl_checkpoint, monkeypatch, tmp_path):
    """Give a tiny folder, how its text encoders are named originally, and options; the architecture is known."""
    like = {"sd1": SD1, "sd2": SD2, "xl": XL}[request.param]
    folder = random_xl_checkpoint if request.param == "xl" else random_checkpoint
    monkeypatch.setattr("sdtpu_worker.diffusion.single_file.CONFIGS", (tiny_architecture(like, folder),))
    open_clip = {"sd1": None, "sd2": "text_encoder", "xl": "text_encoder_2"}[request.param]
    options = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type="epsilon" if request.param == "sd2" else "auto")
    return folder, tmp_path / "model.safetensors", open_clip, options


def assert_same_params(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_one_file_gives_the_parameters_of_the_folder(case, dtype):
    folder, file, open_clip, options = case
    to_single_file(folder, file, open_clip, dtype)
    loaded = load_checkpoint(str(file), jnp.bfloat16, options)
    own = load_checkpoint(str(folder), jnp.bfloat16)
    if dtype is np.float16:  # rounded on its way
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.02,
                                                             atol=1e-3), loaded.params, own.params)  # fmt: skip
    else:
        assert_same_params(loaded.params, own.params)


def test_what_training_leaves_in_a_file_is_left_out_and_anything_else_is_named(case):
    folder, file, open_clip, options = case
    zeros = np.zeros(3, np.float32)
    to_single_file(folder, file, open_clip, alphas_cumprod=zeros, model_ema__decay=zeros, denoiser__sigmas=zeros)
    assert_same_params(load_checkpoint(str(file), options=options).params, load_checkpoint(str(folder)).params)
    to_single_file(folder, file, open_clip, model__extra__weight=zeros)
    with pytest.raises(InvalidCheckpoint, match=r"has tensors that such a model has not: model\.extra\.weight"):
        load_checkpoint(str(file), options=options)
    to_single_file(folder, file, open_clip, model__diffusion_model__more__weight=zeros)
    with pytest.raises(InvalidCheckpoint, match=r"unexpected: more\.weight"):
        load_checkpoint(str(file), options=options)


def test_fp8_is_read(case):
    folder, file, open_clip, options = case
    to_single_file(folder, file, open_clip)
    own = load_checkpoint(str(file), options=options).params
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    parts, offset = [], 0
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        begin, end = entry["data_offsets"]
        values = np.frombuffer(body[begin:end], np.float32).astype(ml_dtypes.float8_e4m3fn).tobytes()
        entry |= {"dtype": "F8_E4M3", "data_offsets": [offset, offset + len(values)]}
        offset += len(values)
        parts.append(values)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    read = load_checkpoint(str(file), options=options).params
    weight = own["unet"]["conv_in.weight"]
    np.testing.assert_array_equal(
        read["unet"]["conv_in.weight"], weight.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


def test_a_file_needs_a_vocabulary_and_a_folder_must_not_have_one(case):
    folder, file, open_clip, _ = case
    to_single_file(folder, file, open_clip)
    with pytest.raises(ConfigurationError, match="sdtpu_tokenizer must name a folder with CLIP's vocabulary"):
        load_checkpoint(str(file))
    with pytest.raises(ConfigurationError, match=r"sdtpu_tokenizer must not be set for .* it is a folder"):
        load_checkpoint(str(folder), options=OPTIONS)
    with pytest.raises(ConfigurationError, match=r"sdtpu_prediction_type must be auto for .* it is a folder"):
        load_checkpoint(str(folder), options=LoadOptions(prediction_type="epsilon"))


def test_what_a_model_predicts_is_said_by_the_setting_or_the_file(case):
    folder, file, open_clip, options = case
    to_single_file(folder, file, open_clip)
    if open_clip == "text_encoder":
        with pytest.raises(ConfigurationError, match="sdtpu_prediction_type must be epsilon or v_prediction"):
            load_checkpoint(str(file), options=OPTIONS)
    as_v = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type="v_prediction")
    assert load_checkpoint(str(file), options=as_v).schedule.prediction_type == "v_prediction"
    assert load_checkpoint(str(file), options=options).schedule.prediction_type == "epsilon"


def test_padding_is_the_text_encoders_own(case):
    folder, file, open_clip, options = case
    to_single_file(folder, file, open_clip)
    family = load_checkpoint(str(file), options=options).family
    vocabulary = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text())
    tokenizers = [getattr(family, name) for name in ("tokenizer", "tokenizer_2") if hasattr(family, name)]
    wanted = {None: ["<|endoftext|>"], "text_encoder": ["!"], "text_encoder_2": ["<|endoftext|>", "!"]}[open_clip]
    assert [tokenizer.pad_id for tokenizer in tokenizers] == [vocabulary[token] for token in wanted]


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            (320, 9, 3, 3),
            "of a size that is not known",
        ),
        ("model.diffusion_model.input_blocks.0.0.weight", (384, 4, 3, 3), "of a size that is not known"),
        ("lora_unet_x.lora_down.weight", (4, 4), "it looks like a LoRA"),
        ("double_blocks.0.img_attn.qkv.weight", (4, 4), "it looks like Flux"),
        ("anything", (4,), "it has no UNet, it looks like nothing known"),
    ],
)
def test_a_file_of_another_kind_is_told_by_what_it_looks_like(tmp_path, name, shape, text):
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float16)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidCheckpoint, match=text):
        load_checkpoint(str(tmp_path / "x.safetensors"), options=OPTIONS)


@pytest.mark.parametrize(
    "data",
    [b"", b"12345678", (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (100).to_bytes(8, "little") + b"[" * 100, (9).to_bytes(8, "little") + b'{"a": {}}',
     (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(70),
     (80).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-9],"data_offsets":[0,-36]}}'.ljust(80),
     (80).to_bytes(8, "little") + b'{"a":{"dtype":"Q4","shape":[9],"data_offsets":[0,36]}}'.ljust(80) + bytes(36)],
)  # fmt: skip
def test_a_broken_file_is_one_clear_error(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match="is not a complete weights file"):
        load_checkpoint(str(tmp_path / "x.safetensors"), options=OPTIONS)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": {**entry, "data_offsets": [4, 12]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(InvalidCheckpoint, match="the data of two tensors overlaps"):
        load_checkpoint(str(tmp_path / "x.safetensors"), options=OPTIONS)


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InvalidCheckpoint, match=r"is a pointer of Git LFS, .*git lfs pull"):
        load_checkpoint(str(tmp_path / "x.safetensors"), options=OPTIONS)


def test_a_file_draws_pictures(case, devices):
    from sdtpu_worker.contract.request import GenerationRequest
    from sdtpu_worker.diffusion.engine import Engine
    from tests.support.engines import generate_all

    folder, file, open_clip, options = case
    to_single_file(folder, file, open_clip)
    loaded = load_checkpoint(str(file), options=options)
    request = GenerationRequest("a fox", seed=1, num_inference_steps=2, height=16, width=16)
    engine = Engine(loaded, devices[:1], resolutions=((16, 16),))
    assert generate_all(engine, [request])[0].pixels.std() > 0
