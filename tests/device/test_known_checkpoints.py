"""The models of checkpoints that people have: their configs are read, and names and shapes are PyTorch's."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.network import Network
from tests.device import known_checkpoints as known
from tests.device import known_parts
from tests.support.random_weights import digest

GOLDEN = Path(__file__).parent / "golden" / "known-checkpoints.json"
# More than one checkpoint has the same UNet; it is built once.
build_unet = functools.lru_cache(lambda text: networks.unet(configs.read_unet_config(json.loads(text))))


def unet(name: str) -> Network:
    return build_unet(json.dumps(known.UNETS[name]))


def text_encoder(name: str) -> Network:
    raw = known_parts.TEXT_ENCODERS[name]
    projects = raw["architectures"] == ["CLIPTextModelWithProjection"]
    return networks.text_encoder(configs.read_clip_text_config(raw), projects)


def halves_of_the_vae(name: str) -> tuple[Network, Network]:
    config = configs.read_autoencoder_config(known_parts.VAES[name])
    return networks.encoder(config), networks.decoder(config)


def assert_same_tensors(name: str, *parts: Network) -> None:
    shapes = {tensor: shape for part in parts for tensor, shape in part.torch_shapes.items()}
    wanted = json.loads(GOLDEN.read_text())[name]
    parameters = sum(part.num_parameters for part in parts)
    assert parameters == wanted["parameters"]
    assert digest(shapes) == wanted["digest"]
    assert parameters == known.PARAMETERS.get(name, parameters)
    assert parameters == pytest.approx(known.PARAMETERS_ROUNDED.get(name, parameters), rel=0.03)


def test_there_are_configs_of_twenty_well_known_checkpoints():
    assert len(known.UNETS) >= 20
    assert len(known.FROM_FILES & set(known.UNETS)) == len(known.FROM_FILES)


@pytest.mark.parametrize("name", known.UNETS)
def test_a_known_unet_has_pytorchs_tensors(name):
    assert_same_tensors(name, unet(name))


@pytest.mark.parametrize("name", known_parts.TEXT_ENCODERS)
def test_a_known_text_encoder_has_pytorchs_tensors(name):
    assert_same_tensors(name, text_encoder(name))


@pytest.mark.parametrize("name", known_parts.VAES)
def test_the_halves_of_a_known_autoencoder_have_pytorchs_tensors(name):
    encoder, decoder = halves_of_the_vae(name)
    assert not encoder.shapes.keys() & decoder.shapes.keys()
    assert_same_tensors(name, encoder, decoder)


def test_the_safety_checker_has_pytorchs_tensors():
    config = configs.read_safety_checker_config(known_parts.SAFETY_CHECKER)
    assert_same_tensors("safety checker", networks.safety_checker(config))


def test_vega_has_as_many_parameters_in_each_part_as_its_authors_say():
    shapes = unet("segmind/Segmind-Vega").torch_shapes
    for prefix, wanted in known.VEGA_BLOCKS.items():
        got = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
        assert got == pytest.approx(wanted, rel=0.01)


def test_names_and_layouts_are_those_of_the_files():
    network = unet("CompVis/stable-diffusion-v1-4")
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight"
    assert network.torch_shapes[name] == (320, 320)
    assert network.torch_axes[name] == (1, 0)
    assert network.shapes["conv_in.weight"] == (3, 3, 4, 320)
    assert network.torch_shapes["conv_in.weight"] == (320, 4, 3, 3)
    assert network.torch_axes["conv_in.weight"] == (2, 3, 1, 0)
    assert "conv_in.bias" not in network.torch_axes
    words = text_encoder("CLIP-L")
    assert words.shapes["text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert "text_model.embeddings.token_embedding.weight" not in words.torch_axes
    assert words.shapes["text_model.encoder.layers.0.self_attn.q_proj.weight"] == (768, 768)
    assert halves_of_the_vae("XL")[1].shapes["decoder.up_blocks.0.resnets.0.conv1.weight"] == (3, 3, 512, 512)
