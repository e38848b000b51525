"""Weights of one part: every format and layout gives the same parameters; what does not fit is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.loading.load import iterate_weights, read_weights
from sdtpu_worker.diffusion.loading.part_files import find_weights, open_part, open_weights
from sdtpu_worker.diffusion.loading.recognise import describe_family
from sdtpu_worker.errors import InvalidCheckpoint

BF16 = ml_dtypes.bfloat16
# Parameters of a made-up UNet in our layout, with one of each kind.
SHAPES = {
    "conv_in.weight": (3, 3, 4, 8),
    "conv_in.bias": (8,),
    "time_embedding.linear_1.weight": (8, 16),
    "down_blocks.0.resnets.1.norm1.weight": (8,),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 6),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight": (32, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (8,),
    "class_embedding.weight": (5, 8),
}
FLAX = {
    "conv_in.kernel": "conv_in.weight",
    "conv_in.bias": "conv_in.bias",
    "time_embedding.linear_1.kernel": "time_embedding.linear_1.weight",
    "down_blocks_0.resnets_1.norm1.scale": "down_blocks.0.resnets.1.norm1.weight",
    "down_blocks_0.attentions_0.proj_in.kernel": "down_blocks.0.attentions.0.proj_in.weight",
    "down_blocks_0.attentions_0.transformer_blocks_0.ff.net_2.kernel": (
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight"
    ),
    "down_blocks_0.attentions_0.transformer_blocks_0.attn1.to_out_0.bias": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"
    ),
    "class_embedding.embedding": "class_embedding.weight",
}
STEM = "diffusion_pytorch_model"


def as_stored(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parameters as PyTorch stores them."""
    stored = {}
    for name, value in params.items():
        if value.ndim == 4:
            stored[name] = np.einsum("hwio->oihw", value)
        else:
            stored[name] = value.T if value.ndim == 2 and "class_embedding" not in name else value
    return {name: np.ascontiguousarray(value) for name, value in stored.items()}


def write_raw(path: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
    """Write a safetensors file byte by byte: the package's NumPy side has no names for the small types."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def params():
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float16).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "unet").mkdir()
    return tmp_path


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], dtype: Any) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == dtype
        assert value.flags.c_contiguous
        assert value.tobytes() == other[name].astype(dtype).tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_every_file_layout_gives_the_same_parameters(folder, params, dtype):
    unet, stored = folder / "unet", as_stored(params)

    def check(expected: str) -> None:
        assert find_weights(folder, "unet").name == expected
        assert_same(read_weights(open_part(folder, "unet"), SHAPES, dtype), params, dtype)

    tree = unflatten_dict({tuple(flax.split(".")): params[name] for flax, name in FLAX.items()})
    (unet / "diffusion_flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    check("diffusion_flax_model.msgpack")
    save_file(stored, unet / f"{STEM}.non_ema.safetensors")
    check(f"{STEM}.non_ema.safetensors")
    save_file({name: value.astype(np.float16) for name, value in stored.items()}, unet / f"{STEM}.fp16.safetensors")
    check(f"{STEM}.fp16.safetensors")
    files = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    chosen = {name: files[i % 2] for i, name in enumerate(stored)}
    for file in files:
        save_file({name: value for name, value in stored.items() if chosen[name] == file}, unet / file)
    (unet / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": chosen}))
    check(f"{STEM}.safetensors.index.json")
    save_file(stored, unet / f"{STEM}.safetensors")
    check(f"{STEM}.safetensors")


def test_an_index_of_a_variant_is_found(folder, params):
    file = f"{STEM}-00001-of-00001.fp16.safetensors"
    save_file(as_stored(params), folder / "unet" / file)
    index = folder / "unet" / f"{STEM}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(params, file)}))
    assert find_weights(folder, "unet") == index
    assert_same(read_weights(open_part(folder, "unet"), SHAPES, np.float32), params, np.float32)


@pytest.mark.parametrize("stored_prefix", ["vision_model.", "vision_model.vision_model."])
def test_a_safety_checker_of_transformers_4_and_5(tmp_path, stored_prefix):
    value = np.ones((2,), np.float32)
    save_file({f"{stored_prefix}embeddings.class_embedding": value}, tmp_path / "a.safetensors")
    for prefix in ("vision_model.", "vision_model.vision_model."):
        shapes = {f"{prefix}embeddings.class_embedding": (2,)}
        assert list(read_weights(open_weights(tmp_path / "a.safetensors"), shapes, np.float32)) == list(shapes)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_flax_weights_keep_their_values_in_our_layout(tmp_path, part):
    """Our layout is Flax's, so what comes out is what went in, under another name."""
    flax_unet = {"down_blocks_0": {"attentions_1": {"transformer_blocks_0": {"attn1": {"to_out_0": {"kernel": 1}}}}}}
    flax = {
        "unet": flax_unet,
        "vae": {"decoder": {"mid_block": {"attentions_0": {"proj_attn": {"kernel": 1}}}}},
        "text_encoder": {"text_model": {"encoder": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": 1}}}}}}},
    }[part]
    name = {
        "unet": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight",
        "vae": "decoder.mid_block.attentions.0.to_out.0.weight",
        "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    }[part]
    (leaf,) = flatten_dict(flax)
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "a.msgpack").write_bytes(msgpack_serialize(unflatten_dict({leaf: value})))
    read = read_weights(open_weights(tmp_path / "a.msgpack"), {name: (2, 3)}, np.float32)
    np.testing.assert_array_equal(read[name], value)


def test_flax_safetensors_give_the_same_parameters(folder, params):
    tensors = {flax: np.ascontiguousarray(params[name]) for flax, name in FLAX.items()}
    save_file(tensors, folder / "unet" / f"{STEM}.safetensors", {"format": "flax"})
    assert_same(read_weights(open_part(folder, "unet"), SHAPES, np.float32), params, np.float32)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("F64", np.float64),
        ("F16", np.float16),
        ("BF16", BF16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
    ],
)
def test_every_storage_type_is_read(tmp_path, params, kind, dtype):
    rounded = {name: value.astype(dtype) for name, value in params.items()}
    write_raw(tmp_path / "a.safetensors", as_stored(rounded), kind)
    for wanted in (np.float32, BF16):
        assert_same(read_weights(open_weights(tmp_path / "a.safetensors"), SHAPES, wanted), rounded, wanted)


def test_old_attentions_of_1_by_1_convolutions(tmp_path):
    shapes = {f"mid.{name}.weight": (2, 3) for name in ("to_q", "to_k", "to_v", "to_out.0")} | {
        "proj.weight": (1, 1, 2, 3)
    }
    weights = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    old = ("query", "key", "value", "proj_attn")
    tensors = {f"mid.{name}.weight": weights[i][:, :, None, None] for i, name in enumerate(old)}
    save_file({**tensors, "proj.weight": weights[4]}, tmp_path / "a.safetensors")
    read = read_weights(open_weights(tmp_path / "a.safetensors"), shapes, np.float32)
    for i, name in enumerate(list(shapes)[:4]):
        np.testing.assert_array_equal(read[name], weights[i].T)
    np.testing.assert_array_equal(read["proj.weight"][0, 0], weights[4].T)


@pytest.mark.parametrize("stored_prefix", ["", "text_model."])
@pytest.mark.parametrize("our_prefix", ["", "text_model."])
def test_a_text_encoder_with_and_without_its_prefix_and_with_surplus(tmp_path, stored_prefix, our_prefix):
    value = np.ones((3, 2), np.float32)
    tensors: dict[str, np.ndarray] = {
        f"{stored_prefix}embeddings.token_embedding.weight": value,
        f"{stored_prefix}embeddings.position_ids": np.arange(77)[None],
        "logit_scale": value,
        "text_projection.weight": value,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    shapes = {f"{our_prefix}embeddings.token_embedding.weight": (3, 2)}
    assert list(read_weights(open_weights(tmp_path / "a.safetensors"), shapes, np.float32)) == list(shapes)
    shapes["text_projection.weight"] = (2, 3)
    read = read_weights(open_weights(tmp_path / "a.safetensors"), shapes, np.float32)
    assert read["text_projection.weight"].shape == (2, 3), "it is read where the model has it"


def test_a_moving_average_beside_the_weights_is_left_out(tmp_path, params):
    average = {f"model_ema.{name}": value + 1 for name, value in as_stored(params).items()}
    save_file(as_stored(params) | average, tmp_path / "a.safetensors")
    assert_same(read_weights(open_weights(tmp_path / "a.safetensors"), SHAPES, np.float32), params, np.float32)


@pytest.mark.parametrize(
    "name", ["vision_model.encoder.layers.24.mlp.fc1.bias", "visual_projection.weight", "logit_scale", "more.weight"]
)
def test_only_a_text_encoder_may_have_the_rest_of_a_clip_beside_it(tmp_path, name):
    value = np.ones((2,), np.float32)
    for shapes, fits in (
        ({"text_model.embeddings.token_embedding.weight": (2,)}, name != "more.weight"),
        ({"vision_model.vision_model.post_layernorm.bias": (2,)}, False),
    ):
        save_file({**dict.fromkeys(shapes, value), name: value}, tmp_path / "a.safetensors")
        source = open_weights(tmp_path / "a.safetensors")
        if fits:
            assert list(read_weights(source, shapes, np.float32)) == list(shapes)
            continue
        with pytest.raises(InvalidCheckpoint, match=rf"unexpected: {name}"):
            read_weights(source, shapes, np.float32)


def test_buffers_of_the_safety_checker_keep_their_layout(tmp_path):
    shapes = {"concept_embeds": (17, 4), "visual_projection.weight": (6, 4)}
    stored = {"concept_embeds": np.zeros((17, 4), np.float32), "visual_projection.weight": np.zeros((4, 6), np.float32)}
    save_file(stored, tmp_path / "a.safetensors")
    read = read_weights(open_weights(tmp_path / "a.safetensors"), shapes, np.float32)
    assert {name: value.shape for name, value in read.items()} == shapes


def test_tensors_that_do_not_fit_are_named_with_what_the_file_looks_like(tmp_path, params):
    stored = as_stored(params)
    del stored["conv_in.bias"]
    stored["conv_in.weight"] = np.zeros((8, 9, 3, 3), np.float32)
    stored["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = np.zeros((8, 1024), np.float32)
    stored["class_embedding.weight"] = np.zeros((5, 8), np.int32)
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(InvalidCheckpoint) as caught:
        next(iterate_weights(open_weights(tmp_path / "a.safetensors"), SHAPES, np.float32))
    assert str(caught.value) == (
        f"{tmp_path}/a.safetensors: the parameters do not fit the config (missing: conv_in.bias; unexpected:"
        " down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight; of another shape: conv_in.weight"
        " ((8, 9, 3, 3), the config makes it (8, 4, 3, 3)); not floating point: class_embedding.weight (int32)); the"
        " file looks like Stable Diffusion 2.x for inpainting (9 input channels); take weights and config from one"
        " checkpoint"
    )


@pytest.mark.parametrize(("stored", "dtype"), [(np.nan, np.float32), (np.inf, BF16), (1e300, np.float32)])
def test_numbers_that_are_not_finite_are_named(tmp_path, params, stored, dtype):
    tensors = {name: value.astype(np.float64) for name, value in as_stored(params).items()}
    tensors["conv_in.bias"][3] = stored
    tensors["class_embedding.weight"][1, 2] = stored
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"a\.safetensors: NaN or infinity in class_embedding.weight, conv_in"):
        read_weights(open_weights(tmp_path / "a.safetensors"), SHAPES, dtype)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        ({"conv_in.weight": (320, 4, 3, 3), "down.attn2.to_k.weight": (320, 768)}, "Stable Diffusion 1.x"),
        ({"conv_in.weight": (320, 8, 3, 3), "down.attn2.to_k.weight": (320, 768)}, "8 input channels"),
        ({"down.attn2.to_k.weight": (640, 2048)}, "Stable Diffusion XL"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "a LoRA"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "Flux"),
        ({"text_model.embeddings.token_embedding.weight": (49408, 1280)}, "OpenCLIP-bigG"),
        ({"decoder.mid_block.attentions.0.to_q.weight": (512, 512)}, "a VAE"),
        ({"x": (1,)}, "nothing known"),
    ],
)
def test_a_family_is_recognised_by_names_and_shapes(names, family):
    assert family in describe_family(names)
