"""Models' configs are refused unless each key and each value is one that the models follow."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields

import pytest
from transformers import CLIPTextConfig, CLIPVisionConfig

from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import config_tables, configs
from sdtpu_worker.models.config_rules import Rule
from tests.device import known_checkpoints as known
from tests.device import known_parts
from tests.support import model_variants as variants

READERS = {
    "unet": (configs.read_unet_config, config_tables.UNET, known.UNETS["CompVis/stable-diffusion-v1-4"]),
    "autoencoder": (configs.read_autoencoder_config, config_tables.AUTOENCODER, known_parts.VAES["Stable Diffusion"]),
    "tiny autoencoder": (configs.read_autoencoder_config, config_tables.AUTOENCODER_TINY, known_parts.VAES["tiny"]),
    "text encoder": (configs.read_clip_text_config, config_tables.CLIP_TEXT, known_parts.TEXT_ENCODERS["CLIP-L"]),
    "safety checker": (configs.read_safety_checker_config, config_tables.SAFETY_CHECKER, known_parts.SAFETY_CHECKER),
}
EVERY_KEY = [(kind, key) for kind, (_, table, _) in READERS.items() for key in table]
NOTHING_LIKE_IT = "a value that no config has"


def rule(kind: str, key: str) -> Rule:
    return READERS[kind][1][key]


@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_each_key_is_honoured_held_to_some_values_or_irrelevant(kind, key):
    read, table, config = READERS[kind]
    if table[key].kind == "irrelevant":
        read({**config, key: NOTHING_LIKE_IT})
        return
    if (kind, key) == ("tiny autoencoder", "_class_name"):
        return  # it decides which table is read
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{key} must be ")) as error:
        read({**config, key: NOTHING_LIKE_IT}, "sd/config.json")
    assert str(error.value).startswith("sd/config.json: ")
    assert repr(NOTHING_LIKE_IT) in str(error.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_key_that_no_table_has_is_refused_by_name(kind):
    read, _, config = READERS[kind]
    with pytest.raises(InvalidCheckpoint, match="use_magic = 7 is not supported"):
        read({**config, "use_magic": 7})


@pytest.mark.parametrize(("kind", "key"), EVERY_KEY)
def test_each_rule_says_what_is_allowed_or_why_the_key_changes_nothing(kind, key):
    assert rule(kind, key).text


@pytest.mark.parametrize(
    ("kind", "config_class"),
    [
        ("unet", configs.UNetConfig),
        ("autoencoder", configs.AutoencoderConfig),
        ("tiny autoencoder", configs.AutoencoderTinyConfig),
    ],
)
def test_what_is_honoured_is_what_a_config_holds(kind, config_class):
    held = set(inspect.signature(config_class.__init__).parameters) - {"self"}
    honoured = {key for key, rule in READERS[kind][1].items() if rule.kind == "honoured"} - {"_class_name"}
    assert honoured <= held
    assert all(READERS[kind][1][key].kind != "irrelevant" for key in held)


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type must be null, got 'timestep'"),
        ("unet", {"num_attention_heads": 8}, "num_attention_heads must be null, got 8"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type must be null or 'text_time', got 'image'"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type must be null"),
        ("unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types must be a list of names"),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type must be"),
        ("unet", {"layers_per_block": [2, 2]}, "layers_per_block must have 4 values"),
        ("unet", {"norm_num_groups": 7}, "norm_num_groups must divide"),
        ("unet", {"attention_head_dim": 9}, "attention_head_dim .* must divide"),
        ("unet", {"norm_eps": True}, "norm_eps must be a number above 0, got True"),
        ("unet", {"in_channels": 4.0}, "in_channels must be a whole number"),
        ("unet", {"sample_size": [64]}, "sample_size must be"),
        ("unet", {"downsample_padding": True}, "downsample_padding must be 0 or 1, got True"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_time_embed_dim must be a whole number where"),
        ("unet", {"transformer_layers_per_block": [1, [1, 2], 1, 1]}, "reverse_transformer_layers_per_block must be"),
        ("unet", {"transformer_layers_per_block": [1, [1], 1, 1], "reverse_transformer_layers_per_block": [1, 1, 1, 1]},
         "a list in transformer_layers_per_block must have 2 values"),
        ("unet", {"reverse_transformer_layers_per_block": [1, [1, 1], 1, 1]}, "must have 3 values"),
        ("unet", {"attention_head_dim": [8, 8, 8, 7]}, "attention_head_dim .* must divide"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "_class_name must be 'UNet2DConditionModel' or"),
        ("autoencoder", {"in_channels": 4}, "in_channels must be 3, got 4"),
        ("autoencoder", {"_class_name": "AsymmetricAutoencoderKL"}, "_class_name must be"),
        ("autoencoder", {"latents_mean": [0.0]}, "latents_mean must have 4 values"),
        ("autoencoder", {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types must be"),
        ("tiny autoencoder", {"upsample_fn": "bilinear"}, "upsample_fn must be 'nearest', got 'bilinear'"),
        ("tiny autoencoder", {"num_decoder_blocks": [3, 1]}, "decoder_block_out_channels must be one number"),
        ("text encoder", {"hidden_act": "relu"}, "hidden_act must be 'quick_gelu' or 'gelu', got 'relu'"),
        ("text encoder", {"num_attention_heads": 5}, "num_attention_heads must divide hidden_size 768"),
        ("text encoder", {"model_type": "t5"}, "model_type must be 'clip_text_model', got 't5'"),
        ("text encoder", {"is_decoder": True}, "is_decoder must be False, got True"),
        ("safety checker", {"vision_config_dict": {"patch_size": 16}}, "must say the same as vision_config"),
        ("safety checker", {"vision_config": {"hidden_act": "tanh"}}, "hidden_act must be"),
    ],
)  # fmt: skip
def test_what_the_models_do_not_follow_is_refused_with_what_is_allowed(kind, changes, text):
    read, _, config = READERS[kind]
    with pytest.raises(InvalidCheckpoint, match=text):
        read({**config, **changes})


def test_what_is_missing_has_pytorchs_defaults():
    config = configs.read_unet_config({})
    assert list(config.block_out_channels) == [320, 640, 1280, 1280]
    assert (config.cross_attention_dim, config.norm_eps, config.downsample_padding) == (1280, 1e-5, 1)
    assert configs.read_autoencoder_config({}).scaling_factor == 0.18215
    assert configs.read_clip_text_config({}).max_position_embeddings == 77


def test_values_that_are_followed_arrive():
    config = configs.read_unet_config({**variants.UNETS["sd1"], "sample_size": [4, 8]})
    assert config.sample_size == [4, 8]
    vae = {**known_parts.VAES["XL"], "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4, "scaling_factor": 0.5}
    config = configs.read_autoencoder_config(vae)
    assert (config.latents_mean, config.latents_std, config.force_upcast) == ([1.0] * 4, [2.0] * 4, True)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(configs.ClipTextConfig, CLIPTextConfig), (configs.ClipVisionConfig, CLIPVisionConfig)]
)
def test_what_is_missing_of_a_clip_config_has_transformers_defaults(ours, theirs):
    defaults = theirs()
    assert {each.name: getattr(defaults, each.name) for each in fields(ours)} == asdict(ours())


def test_the_page_of_configs_names_every_key():
    from docs import model_tables

    page = model_tables.honoured() + model_tables.without_meaning()
    for rules in model_tables.TABLES.values():
        for key in rules:
            assert f"| `{key}` |" in page, key
