"""Checkpoints in one file, in the original layout: the same parameters as from a folder, everything accounted for."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.loading import architectures
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_autoencoder_config, read_clip_text_config, read_unet_config
from tests.device.original_layout import make_tiny, to_single_file
from tests.support.checkpoints import SHIPPED

OPTIONS = LoadOptions(tokenizer=str(SHIPPED / "tokenizer"))


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        ("sd1", (859_520_964, 83_653_863, 123_060_480)),
        ("sd2", (865_910_724, 83_653_863, 340_387_840)),
        ("sdxl", (2_567_463_684, 83_653_863, 123_060_480, 694_659_840)),
    ],
)
def test_the_architectures_are_those_of_the_published_checkpoints(architecture, counts):
    unet = networks.unet(read_unet_config(architectures.UNETS[architecture])).shapes
    vae_config = read_autoencoder_config(architectures.VAES[architecture])
    vae = {**networks.decoder(vae_config).shapes, **networks.encoder(vae_config).shapes}
    texts = [
        networks.text_encoder(read_clip_text_config(config), projection=part == "text_encoder_2").shapes
        for part, config in architectures.TEXT_ENCODERS[architecture].items()
    ]
    assert tuple(sum(map(prod, shapes.values())) for shapes in (unet, vae, *texts)) == counts


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def case(request, random_checkpoint, random_xl_checkpoint, monkeypatch, tmp_path):
    """Give a tiny folder, the file to write, the architecture, whose configs are the folder's, and options."""
    architecture = request.param
    folder = random_xl_checkpoint if architecture == "sdxl" else random_checkpoint
    configs = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")}
    make_tiny(monkeypatch, architecture, configs)
    options = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type="epsilon" if architecture == "sd2" else "auto")
    return folder, tmp_path / "model.safetensors", architecture, options


def assert_same_params(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_one_file_gives_the_parameters_of_the_folder(case, dtype):
    folder, file, architecture, options = case
    to_single_file(folder, file, architecture, dtype)
    loaded = load_checkpoint(str(file), jnp.bfloat16, options)
    own = load_checkpoint(str(folder), jnp.bfloat16)
    if dtype is np.float16:  # rounded on its way
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.02,
                                                             atol=1e-3), loaded.params, own.params)  # fmt: skip
    else:
        assert_same_params(loaded.params, own.params)


def test_what_training_leaves_in_a_file_is_left_out_and_anything_else_is_named(case):
    folder, file, architecture, options = case
    zeros = np.zeros(3, np.float32)
    to_single_file(folder, file, architecture, alphas_cumprod=zeros, model_ema__decay=zeros, denoiser__sigmas=zeros)
    assert_same_params(load_checkpoint(str(file), options=options).params, load_checkpoint(str(folder)).params)
    to_single_file(folder, file, architecture, model__extra__weight=zeros)
    with pytest.raises(InvalidCheckpoint, match=r"belong to no part of Stable Diffusion .*: model\.extra\.weight"):
        load_checkpoint(str(file), options=options)
    to_single_file(folder, file, architecture, model__diffusion_model__more__weight=zeros)
    with pytest.raises(InvalidCheckpoint, match=r"unexpected: model\.diffusion_model\.more\.weight\).*convert it"):
        load_checkpoint(str(file), options=options)


def test_fp8_is_read(case):
    folder, file, architecture, options = case
    to_single_file(folder, file, architecture)
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
    folder, file, architecture, _ = case
    to_single_file(folder, file, architecture)
    with pytest.raises(ConfigurationError, match="sdtpu_tokenizer must name a folder with CLIP's vocabulary"):
        load_checkpoint(str(file))
    with pytest.raises(ConfigurationError, match=r"sdtpu_tokenizer must not be set for .* it is a folder"):
        load_checkpoint(str(folder), options=OPTIONS)
    with pytest.raises(ConfigurationError, match=r"sdtpu_prediction_type must be auto for .* it is a folder"):
        load_checkpoint(str(folder), options=LoadOptions(prediction_type="epsilon"))


def test_what_a_model_predicts_is_said_by_the_setting_or_the_file(case):
    folder, file, architecture, options = case
    to_single_file(folder, file, architecture)
    if architecture == "sd2":
        with pytest.raises(ConfigurationError, match="sdtpu_prediction_type must be epsilon or v_prediction"):
            load_checkpoint(str(file), options=OPTIONS)
    as_v = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type="v_prediction")
    assert load_checkpoint(str(file), options=as_v).schedule.prediction_type == "v_prediction"
    assert load_checkpoint(str(file), options=options).schedule.prediction_type == "epsilon"


def test_padding_is_the_text_encoders_own(case):
    folder, file, architecture, options = case
    to_single_file(folder, file, architecture)
    family = load_checkpoint(str(file), options=options).family
    vocabulary = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text())
    tokenizers = [getattr(family, name) for name in ("tokenizer", "tokenizer_2") if hasattr(family, name)]
    wanted = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[architecture]
    assert [tokenizer.pad_id for tokenizer in tokenizers] == [vocabulary[token] for token in wanted]


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("lora_unet_x.lora_down.weight", (4, 4), "it looks like a LoRA, which goes into sdtpu_loras_merged"),
        ("double_blocks.0.img_attn.qkv.weight", (4, 4), "it looks like Flux"),
        ("down_blocks.0.attn2.to_k.weight", (4, 768), r"like Stable Diffusion 1\.x in the diffusers layout"),
        ("anything", (4,), r"in the original layout \(no model\.diffusion_model\.\*\): it looks like nothing known"),
    ],
)
def test_a_file_of_another_kind_is_told_by_what_it_looks_like(tmp_path, name, shape, text):
    save_file({name: np.zeros(shape, np.float16)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidCheckpoint, match=text):
        load_checkpoint(str(tmp_path / "x.safetensors"), options=OPTIONS)


def test_a_file_of_another_size_is_told_by_its_shapes(case, monkeypatch):
    folder, file, architecture, options = case
    to_single_file(folder, file, architecture)
    unet = architectures.UNETS[architecture]
    monkeypatch.setitem(architectures.UNETS, architecture, {**unet, "layers_per_block": unet["layers_per_block"] + 1})
    with pytest.raises(InvalidCheckpoint, match=r"missing: .* a file must have the sizes of a published"):
        load_checkpoint(str(file), options=options)


def test_an_inpainting_file_is_known_by_its_first_convolution(case):
    folder, file, architecture, options = case
    entry = np.zeros((32, 9, 3, 3), np.float32)
    to_single_file(folder, file, architecture, model__diffusion_model__input_blocks__0__0__weight=entry)
    assert load_checkpoint(str(file), options=options).family.picture_use is PictureUse.INPAINT
    with pytest.raises(ConfigurationError, match=r"sdtpu_image_inputs must be on"):
        load_checkpoint(str(file), options=replace(options, image_inputs=False))


def test_the_vocabulary_is_found_in_a_checkpoints_folder_too(case, tmp_path):
    folder, file, architecture, _ = case
    to_single_file(folder, file, architecture)
    (tmp_path / "empty").mkdir()
    for place in (SHIPPED, SHIPPED / "tokenizer"):
        load_checkpoint(str(file), options=LoadOptions(tokenizer=str(place), prediction_type="epsilon"))
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigurationError, match=r"sdtpu_tokenizer must name a folder .*; .* has none"):
            load_checkpoint(str(file), options=LoadOptions(tokenizer=str(place), prediction_type="epsilon"))


def test_marks_in_a_file_say_how_it_was_trained(case):
    folder, file, architecture, _ = case
    mark = np.zeros(0, np.float32)
    to_single_file(folder, file, architecture, v_pred=mark, ztsnr=mark)
    schedule = load_checkpoint(str(file), options=OPTIONS).schedule
    config = (schedule.config["rescale_betas_zero_snr"], schedule.config["timestep_spacing"])
    assert (schedule.prediction_type, *config) == ("v_prediction", True, "trailing")


@pytest.mark.parametrize(
    ("case", "prediction_type", "sampler"),
    [("sd1", "epsilon", "pndm"), ("sd2", "epsilon", "pndm"), ("sd2", "v_prediction", "ddim"),
     ("sdxl", "epsilon", "euler")],
    indirect=["case"],
)  # fmt: skip
def test_the_sampler_is_that_of_the_published_checkpoint(case, prediction_type, sampler):
    folder, file, architecture, _ = case
    to_single_file(folder, file, architecture)
    options = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type=prediction_type)
    assert load_checkpoint(str(file), options=options).defaults.sampler == sampler


@pytest.mark.parametrize("case", ["sd2"], indirect=True)
def test_models_of_2_x_that_predict_v_draw_768_pixels(case):
    folder, file, architecture, _ = case
    to_single_file(folder, file, architecture)
    options = LoadOptions(tokenizer=OPTIONS.tokenizer, prediction_type="v_prediction")
    family = load_checkpoint(str(file), options=options).family
    assert family.default_size == (96 * family.scale_factor, 96 * family.scale_factor)


def test_a_file_draws_pictures(case, devices):
    from sdtpu_worker.contract.request import GenerationRequest
    from sdtpu_worker.diffusion.engine import Engine
    from tests.support.engines import generate_all

    folder, file, architecture, options = case
    to_single_file(folder, file, architecture)
    loaded = load_checkpoint(str(file), options=options)
    request = GenerationRequest("a fox", seed=1, num_inference_steps=2, height=16, width=16)
    engine = Engine(loaded, devices[:1], resolutions=((16, 16),))
    assert generate_all(engine, [request])[0].pixels.std() > 0
