"""LoRAs merged at load: as diffusers merges them where it can, by the formula where it cannot; the rest is refused."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.lora import MergedLora, merge_loras
from sdtpu_worker.diffusion.loading.lora_files import find_lora
from sdtpu_worker.diffusion.loading.part_files import open_weights
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import from_pytorch

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "loras.json.gz").read_bytes()))
Tensors = dict[str, np.ndarray]


def draw(name: str, shape: Any) -> np.ndarray:
    """Return the array that the oracle draws for a name (tools/oracle/loras.py)."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def prefixed(part: str, name: str) -> str:
    """Return our name of a tensor of the oracle: its transformers 5 has no `text_model.`."""
    return f"text_model.{name}" if part == "text_encoder" and not name.startswith("text_") else name


@pytest.mark.parametrize("layout", GOLDEN)
def test_a_lora_changes_the_weights_as_diffusers_does(layout, tmp_path):
    case = GOLDEN[layout]
    lora = {key: np.asarray(2.0 if key.endswith(".alpha") else draw(key, shape), np.float32)
            for key, shape in case["keys"].items()}  # fmt: skip
    save_file(lora, tmp_path / "lora.safetensors")
    bases = {
        part: {name: draw(f"{part}.{name}", shape) for name, shape in of.items()} for part, of in case["shapes"].items()
    }
    shapes = {
        part: {prefixed(part, name): from_pytorch(name, value).shape for name, value in of.items()}
        for part, of in bases.items()
    }
    merge = merge_loras([(str(tmp_path / "lora.safetensors"), 0.7)], shapes)
    assert merge.merged[0].count == sum(".up." in key or "lora_up" in key or "lora_B" in key for key in case["keys"])
    for part, tensors in bases.items():
        save_file(tensors, tmp_path / f"{part}.safetensors")
        source = open_weights(tmp_path / f"{part}.safetensors")
        merged = read_weights(source, shapes[part], np.float32, merge.changes[part])
        for name, value in tensors.items():
            check = from_pytorch(name, draw(f"check {name}", value.shape)).astype(np.float64)
            got = float(np.sum(merged[prefixed(part, name)] * check))
            spread = float(np.linalg.norm(check) * np.linalg.norm(merged[prefixed(part, name)]))
            assert abs(got - case["products"][f"{part}.{name}"]) <= 1e-6 * spread, name


# A made-up model in our layout: linear (in, out) and convolution HWIO.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (6, 4),
        "mid_block.attentions.0.proj_in.weight": (1, 1, 6, 4),
        "mid_block.resnets.0.conv1.weight": (3, 3, 6, 4),
        "mid_block.resnets.0.conv1.bias": (4,),
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 4)},
    "text_encoder_2": {"text_model.encoder.layers.0.mlp.fc1.weight": (6, 4), "text_projection.weight": (6, 4)},
}
OUT, PROJ, CONV = list(SHAPES["unet"])[:3]
Q, (FC, PROJECTION) = next(iter(SHAPES["text_encoder"])), list(SHAPES["text_encoder_2"])


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> str:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)
    return str(path)


def merged(part: str, name: str, loras: list[tuple[str, float]]) -> np.ndarray:
    """Return what becomes of a weight of zeros."""
    merge = merge_loras(loras, SHAPES)
    return merge.changes[part][name](np.zeros(SHAPES[part][name], np.float32))


A, B = draw("a", (3, 6)), draw("b", (4, 3))  # down (rank, in) and up (out, rank)
PRODUCT = (B @ A).T  # in our layout


@pytest.mark.parametrize(
    ("part", "name", "module"),
    [
        ("unet", OUT, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        ("unet", OUT, "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0"),
        ("text_encoder", Q, "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder", Q, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder_2", FC, "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder_2", PROJECTION, "lora_te2_text_projection"),
    ],
)
def test_kohyas_names_with_an_alpha(tmp_path, part, name, module):
    tensors: dict[str, Any] = {
        f"{module}.lora_down.weight": A,
        f"{module}.lora_up.weight": B,
        f"{module}.alpha": np.float32(1.5),
    }
    got = merged(part, name, [(write(tmp_path / "a.safetensors", tensors), 0.5)])
    np.testing.assert_allclose(got, 0.5 * 1.5 / 3 * PRODUCT, rtol=1e-5)


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("part", "name", "down", "up"),
    [
        ("unet", OUT, f"unet.{ATTENTION}.to_out.0.lora_A.weight", f"unet.{ATTENTION}.to_out.0.lora_B.weight"),
        ("unet", OUT, f"unet.{ATTENTION}.to_out.0.lora.down.weight", f"unet.{ATTENTION}.to_out.0.lora.up.weight"),
        ("unet", OUT, f"{ATTENTION}.processor.to_out_lora.down.weight", f"{ATTENTION}.processor.to_out_lora.up.weight"),
        ("unet", OUT, f"base_model.model.{ATTENTION}.to_out.0.lora_A.weight",
         f"base_model.model.{ATTENTION}.to_out.0.lora_B.weight"),
        ("unet", OUT, "unet.middle_block.1.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
         "unet.middle_block.1.transformer_blocks.0.attn1.to_out.0.lora_B.weight"),
        ("text_encoder", Q, f"text_encoder.{Q[:-7]}.lora_A.weight", f"text_encoder.{Q[:-7]}.lora_B.weight"),
        ("text_encoder", Q, "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
         "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight"),
        ("text_encoder", Q, "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight"),
        ("text_encoder_2", FC, f"text_encoder_2.{FC[:-7]}.lora_linear_layer.down.weight",
         f"text_encoder_2.{FC[:-7]}.lora_linear_layer.up.weight"),
    ],
)  # fmt: skip
def test_the_names_of_diffusers_and_peft_without_an_alpha(tmp_path, part, name, down, up):
    got = merged(part, name, [(write(tmp_path / "a.safetensors", {down: A, up: B}), 1.0)])
    np.testing.assert_allclose(got, PRODUCT, rtol=1e-5)


def test_a_linear_lora_of_a_1_by_1_convolution_and_the_reverse(tmp_path):
    proj, out = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_" + OUT[:-7].replace(".", "_")
    tensors = {
        f"{proj}.lora_down.weight": A,
        f"{proj}.lora_up.weight": B,
        f"{out}.lora_down.weight": A[:, :, None, None],
        f"{out}.lora_up.weight": B[:, :, None, None],
    }
    lora = [(write(tmp_path / "a.safetensors", tensors), 1.0)]
    np.testing.assert_allclose(merged("unet", PROJ, lora)[0, 0], PRODUCT, rtol=1e-5)
    np.testing.assert_allclose(merged("unet", OUT, lora), PRODUCT, rtol=1e-5)


def test_locons_convolutions_with_and_without_a_mid(tmp_path):
    conv = "lora_unet_mid_block_resnets_0_conv1"
    down, mid = draw("d", (3, 6, 3, 3)), draw("m", (3, 3, 3, 3))
    up = B[:, :, None, None]
    plain = {f"{conv}.lora_down.weight": down, f"{conv}.lora_up.weight": up}
    got = merged("unet", CONV, [(write(tmp_path / "a.safetensors", plain), 1.0)])
    np.testing.assert_allclose(got, np.einsum("or,rihw->hwio", B, down), rtol=1e-4, atol=1e-5)
    tucker = {
        f"{conv}.lora_down.weight": A[:, :, None, None],
        f"{conv}.lora_up.weight": up,
        f"{conv}.lora_mid.weight": mid,
    }
    got = merged("unet", CONV, [(write(tmp_path / "b.safetensors", tucker), 1.0)])
    np.testing.assert_allclose(got, np.einsum("oa,abhw,bi->hwio", B, mid, A), rtol=1e-4, atol=1e-5)


def test_several_loras_are_added_in_float32_and_cast_once(tmp_path):
    key = f"unet.{OUT[:-7]}"
    one = write(tmp_path / "one.safetensors", {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B})
    two = write(tmp_path / "two.safetensors", {f"{key}.lora_A.weight": A.astype(np.float16), f"{key}.lora_B.weight": B})
    merge = merge_loras([(one, 1.0), (two, -0.5)], SHAPES)
    assert merge.merged == (MergedLora(one, 1.0, 1), MergedLora(two, -0.5, 1))
    base = draw("base", (4, 6)).astype(np.float16)
    write(tmp_path / "base.safetensors", {OUT: base})
    source = open_weights(tmp_path / "base.safetensors")
    got = read_weights(source, {OUT: (6, 4)}, ml_dtypes.bfloat16, merge.changes["unet"])[OUT]
    expected = base.T.astype(np.float32) + PRODUCT - 0.5 * (B @ A.astype(np.float16).astype(np.float32)).T
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.lora_alpha": 6, "unet.r": 3}, 2),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 3**0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_out.0": 3}}, 1),
    ],
)
def test_pefts_alpha_comes_from_the_metadata(tmp_path, config, scale):
    key = f"unet.{OUT[:-7]}"
    tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    lora = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    np.testing.assert_allclose(merged("unet", OUT, [(lora, 1.0)]), scale * PRODUCT, rtol=1e-5)


def test_pefts_alpha_comes_from_the_config_beside_it(tmp_path):
    key = f"base_model.model.{OUT[:-7]}"
    write(tmp_path / "adapter_model.safetensors", {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 3}))
    np.testing.assert_allclose(merged("unet", OUT, [(str(tmp_path), 1.0)]), 4 * PRODUCT, rtol=1e-5)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InvalidCheckpoint, match="the LoRA's config cannot be read"):
        merged("unet", OUT, [(str(tmp_path), 1.0)])


FLAT = "lora_unet_" + OUT[:-7].replace(".", "_")
PAIR = {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{FLAT}.hada_w1_a": A}, rf"{FLAT}\.hada_w1_a \(LoHa\)"),
        ({f"{FLAT}.lokr_w1": A}, rf"{FLAT}\.lokr_w1 \(LoKr\)"),
        ({**PAIR, f"{FLAT}.dora_scale": A}, rf"{FLAT}\.dora_scale \(DoRA\)"),
        ({**PAIR, "lora_unet_conv_in.diff": A}, r"conv_in\.diff \(full differences\)"),
        ({**PAIR, "emb_params": A}, r"emb_params \(unknown\)"),
        ({f"{FLAT}.lora_down.weight": A}, r"no pair of down and up"),
        ({f"{FLAT}.alpha": np.ones(1, np.float32)}, r"no pair of down and up"),
        ({**PAIR, f"{FLAT}.alpha": np.ones(2, np.float32)}, r"alpha of .* must be one number"),
        ({f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B[:, :2]}, r"\(4, 2\)\) does not fit .* \(4, 6\)"),
        ({f"{FLAT}.lora_down.weight": A[:, :5], f"{FLAT}.lora_up.weight": B}, r"does not fit the model's weight"),
        ({k.replace("attn1", "attn9"): v for k, v in PAIR.items()}, r"has no lora_unet_.*attn9.*for another one\?"),
        ({**PAIR, f"unet.{OUT[:-7]}.lora_A.weight": A, f"unet.{OUT[:-7]}.lora_B.weight": B}, "several layers for"),
    ],
)
def test_what_is_no_lora_or_does_not_fit_is_named(tmp_path, tensors, message):
    with pytest.raises(InvalidCheckpoint, match=message):
        merge_loras([(write(tmp_path / "a.safetensors", tensors), 1.0)], SHAPES)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(InvalidCheckpoint, match="must be a finite number"):
        merge_loras([("a", weight)], SHAPES)


def test_a_lora_that_is_not_there_or_not_one_file(tmp_path):
    with pytest.raises(InvalidCheckpoint, match=r"must hold one \.safetensors file \(found none\)"):
        find_lora(str(tmp_path))
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", PAIR)
    with pytest.raises(InvalidCheckpoint, match=r"found a\.safetensors, b\.safetensors\); name the file itself"):
        find_lora(str(tmp_path))
    write(tmp_path / "pytorch_lora_weights.safetensors", PAIR)
    assert find_lora(str(tmp_path)).name == "pytorch_lora_weights.safetensors"
    with pytest.raises(InvalidCheckpoint, match="never a pickle"):
        find_lora("some/lora.ckpt")
    for name in ("/nowhere/at/all", "loras/watercolour.safetensors", "./a/b", "name", "owner/name/folder"):
        with pytest.raises(InvalidCheckpoint, match="there is no file or folder"):
            find_lora(name)


def test_a_lora_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    write(tmp_path / "a.safetensors", PAIR)
    assert find_lora("owner/name") == find_lora("owner/name/a.safetensors") == tmp_path / "a.safetensors"
    assert find_lora("owner/name/b/c.safetensors") == tmp_path / "b" / "c.safetensors"
    assert asked == [
        ("owner/name", "main", ["*.safetensors", "adapter_config.json"]),
        ("owner/name", "main", ["a.safetensors", "adapter_config.json"]),
        ("owner/name", "main", ["b/c.safetensors", "b/adapter_config.json"]),
    ]


def test_a_hub_that_does_not_give_a_lora(monkeypatch):
    def snapshot_download(name, revision, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InvalidCheckpoint, match=r"no file or folder 'owner/name' here.*OSError: no network"):
        find_lora("owner/name")
