"""LoRAs that are merged when a whole checkpoint is loaded: into every part, in full, or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.loading.original_names import original_unet_names
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import to_pytorch

RANK, ALPHA = 3, 2.0
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(params=[False, True], ids=["sd", "xl"])
def folder(request, random_checkpoint, random_xl_checkpoint):
    return random_xl_checkpoint if request.param else random_checkpoint


def matrices(folder, part, module, rank=RANK, seed=0):
    """Return down, up and what they change the weight by, in PyTorch's layout."""
    (path,) = (folder / part).glob("*.safetensors")
    shape = load_file(path)[f"{module}.weight"].shape
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
    up = rng.standard_normal((shape[0], rank, *((1, 1) if len(shape) == 4 else ()))).astype(np.float32)
    flat = up.reshape(shape[0], rank) @ down.reshape(rank, -1)
    return down, up, flat.reshape(shape)


def merged(folder, file, weight=0.5):
    options = LoadOptions(loras_merged=((str(file), weight),))
    return load_checkpoint(str(folder), options=options)


def changes(folder, loaded):
    """Return by part and name what differs from the checkpoint without a LoRA, in PyTorch's layout."""
    own = load_checkpoint(str(folder)).params
    return {
        (part, name): to_pytorch(name, loaded.params[part][name] - value)
        for part, params in own.items()
        for name, value in params.items()
        if not np.array_equal(loaded.params[part][name], value)
    }


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
DIFFUSERS = {"down": "lora.down.weight", "up": "lora.up.weight"}


def kohya(part, module):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    return prefix + module.replace(".", "_")


def dotted(part, module):
    return f"{part}.{module}"


@pytest.mark.parametrize(("naming", "roles"), [(kohya, KOHYA), (dotted, PEFT), (dotted, DIFFUSERS)])
@pytest.mark.parametrize("with_alpha", [True, False])
def test_every_layout_is_merged_into_the_unet_and_the_text_encoders(folder, tmp_path, naming, roles, with_alpha):
    parts = [("unet", LINEAR), ("unet", OUT), ("unet", CONV), ("unet", POINT), ("text_encoder", TEXT)]
    parts += [("text_encoder_2", TEXT)] if (folder / "text_encoder_2").exists() else []
    tensors, wanted = {}, {}
    for i, (part, module) in enumerate(parts):
        down, up, change = matrices(folder, part, module, seed=i)
        key = naming(part, module)
        tensors |= {f"{key}.{roles['down']}": down, f"{key}.{roles['up']}": up}
        if with_alpha:
            tensors[f"{key}.alpha"] = np.array(ALPHA, np.float32)
        wanted[part, f"{module}.weight"] = 0.5 * change * (ALPHA / RANK if with_alpha else 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = merged(folder, tmp_path / "lora.safetensors")
    found = changes(folder, loaded)
    assert set(found) == set(wanted)
    for key, change in wanted.items():
        np.testing.assert_allclose(found[key], change, rtol=1e-4, atol=1e-5)
    (lora,) = loaded.loras
    assert (lora.name, lora.weight, lora.count) == (str(tmp_path / "lora.safetensors"), 0.5, len(parts))


def test_names_of_the_original_code_are_understood(folder, tmp_path):
    (path,) = (folder / "unet").glob("*.safetensors")
    original = original_unet_names(load_file(path))
    down, up, change = matrices(folder, "unet", LINEAR)
    key = "lora_unet_" + original[f"{LINEAR}.weight"].name.removesuffix(".weight").replace(".", "_")
    assert "input_blocks" in key
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    found = changes(folder, merged(folder, tmp_path / "lora.safetensors", 1.0))
    np.testing.assert_allclose(found["unet", f"{LINEAR}.weight"], change, rtol=1e-4, atol=1e-5)


def test_processors_of_older_files_a_middle_matrix_and_two_loras_add_up(folder, tmp_path):
    down, up, change = matrices(folder, "unet", OUT)
    key = f"unet.{OUT.removesuffix('.to_out.0')}.processor.to_out_lora"
    save_file({f"{key}.down.weight": down, f"{key}.up.weight": up}, tmp_path / "a.safetensors")
    (path,) = (folder / "unet").glob("*.safetensors")
    shape = load_file(path)[f"{CONV}.weight"].shape
    rng = np.random.default_rng(4)
    first, middle = rng.standard_normal((RANK, shape[1], 1, 1)), rng.standard_normal((RANK, RANK, 3, 3))
    last = rng.standard_normal((shape[0], RANK, 1, 1))
    arrays = {"lora_down": first, "lora_mid": middle, "lora_up": last}
    tensors = {f"{kohya('unet', CONV)}.{name}.weight": array.astype(np.float32) for name, array in arrays.items()}
    tensors |= {f"{kohya('unet', OUT)}.lora_down.weight": down, f"{kohya('unet', OUT)}.lora_up.weight": up}
    save_file(tensors, tmp_path / "b.safetensors")
    files = tuple((str(tmp_path / name), weight) for name, weight in (("a.safetensors", 1.0), ("b.safetensors", -0.25)))
    found = changes(folder, load_checkpoint(str(folder), options=LoadOptions(loras_merged=files)))
    np.testing.assert_allclose(found["unet", f"{OUT}.weight"], 0.75 * change, rtol=1e-3, atol=1e-4)
    wanted = np.zeros(shape)
    for i in range(3):
        for j in range(3):
            wanted[:, :, i, j] = last[:, :, 0, 0] @ middle[:, :, i, j] @ first[:, :, 0, 0]
    np.testing.assert_allclose(found["unet", f"{CONV}.weight"], -0.25 * wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("end", ["alpha", "lora.alpha", "lora_linear_layer.alpha"])
def test_an_alpha_may_be_a_whole_number_and_stand_beside_the_matrices(random_checkpoint, tmp_path, end):
    down, up, change = matrices(random_checkpoint, "unet", LINEAR)
    tensors = {f"unet.{LINEAR}.lora.down.weight": down, f"unet.{LINEAR}.lora.up.weight": up}
    save_file({**tensors, f"unet.{LINEAR}.{end}": np.array(2)}, tmp_path / "lora.safetensors")
    found = changes(random_checkpoint, merged(random_checkpoint, tmp_path / "lora.safetensors", 1.0))
    np.testing.assert_allclose(found["unet", f"{LINEAR}.weight"], change * 2 / RANK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lora_unet_x.hada_w1_a", r"is no LoRA that can be merged: lora_unet_x\.hada_w1_a \(LoHa\)"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("lora_unet_x.on_input", "IA3"),
        ("what.is.this", r"can be merged: what\.is\.this \(unknown\); LoRA and LoCon are, in the layouts of kohya"),
        ("lora_unet_nowhere.lora_down.weight", r"lora_unet_nowhere \(no pair of down and up\)"),
    ],
)
def test_a_key_that_cannot_be_merged_is_named(random_checkpoint, tmp_path, key, text):
    down, up, _ = matrices(random_checkpoint, "unet", LINEAR)
    good = kohya("unet", LINEAR)
    tensors = {f"{good}.lora_down.weight": down, f"{good}.lora_up.weight": up, key: np.zeros((3, 4), np.float32)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidCheckpoint, match=text):
        merged(random_checkpoint, tmp_path / "lora.safetensors")


def test_a_lora_of_another_kind_of_checkpoint_is_refused(random_checkpoint, tmp_path):
    down, up, _ = matrices(random_checkpoint, "unet", LINEAR)
    for module, first, text in (
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", down, "the model, which has no lora_te2_"),
        ("lora_unet_down_blocks_9_resnets_0_conv1", down, "does not fit the model, which has no lora_unet_down"),
        (kohya("unet", LINEAR), down[:, :5], r"does not fit the model's weight .* another kind of checkpoint"),
        (kohya("unet", LINEAR), down[:2], "does not fit the model's weight"),
        (kohya("unet", LINEAR), down * np.nan, r"lora.safetensors: lora_unet_.* not finite"),
    ):
        tensors = {f"{module}.lora_down.weight": np.ascontiguousarray(first), f"{module}.lora_up.weight": up}
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(InvalidCheckpoint, match=text):
            merged(random_checkpoint, tmp_path / "lora.safetensors")


def test_a_file_that_is_missing_or_a_pickle_is_refused(random_checkpoint, tmp_path):
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02" + json.dumps({}).encode() * 10)
    for name, text in (("nothing.safetensors", "there is no file or folder"), ("pickle.safetensors", "is a pickle")):
        with pytest.raises(InvalidCheckpoint, match=text):
            merged(random_checkpoint, tmp_path / name)
