"""The networks against PyTorch's, with the same random weights and inputs: see `tools/oracle/models.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import CLIPConfig, CLIPTextConfig

from sdtpu_worker.models.autoencoder import AutoencoderDecoder, AutoencoderEncoder
from sdtpu_worker.models.clip_text import CLIPTextModel
from sdtpu_worker.models.configs import read_autoencoder_config, read_unet_config
from sdtpu_worker.models.layout import from_pytorch, pytorch_shape
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.safety_checker import SafetyChecker
from sdtpu_worker.models.unet import UNet2DConditionModel
from tests.device.model_variants import CHECKERS, TEXT_IDS, TEXTS, UNETS, VAES
from tests.support.paths import ROOT
from tests.support.random_weights import draw, inputs

TIME_IDS = np.array([[64, 48, 0, 8, 64, 64], [32, 32, 0, 0, 64, 32]], np.float32)


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "device" / "golden" / "models.npz") as file:
        yield file


def random_params(network: Network, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    shapes = {name: pytorch_shape(name, shape) for name, shape in network.shapes.items()}
    return {name: from_pytorch(name, draw(name, shape)).astype(dtype) for name, shape in shapes.items()}


def run(network: Network, *args: Any, dtype: Any = np.float32, **kwargs: Any) -> Any:
    return jax.jit(lambda params: network(params, *args, **kwargs))(random_params(network, dtype))


def error(ours: Any, theirs: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def unet_inputs(config: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    size = config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    more: dict[str, Any] = {}
    if config.get("addition_embed_type"):
        more = {"text_embeds": inputs("text_embeds", 2, 16), "time_ids": TIME_IDS}
    if config.get("time_cond_proj_dim"):
        more["timestep_cond"] = inputs("timestep_cond", 2, config["time_cond_proj_dim"])
    sample = inputs("sample", 2, height, width, config.get("in_channels", 4))
    return [sample, np.array([901.0, 17.5], np.float32), inputs("context", 2, 5, 24)], more


def make_unet(config: dict[str, Any]) -> Network:
    read = read_unet_config(config)
    return Network(lambda: UNet2DConditionModel(read))


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_computes_what_pytorchs_does(golden, name):
    args, more = unet_inputs(UNETS[name])
    assert error(run(make_unet(UNETS[name]), *args, **more), golden[f"unet/{name}"]) < 1e-4


@pytest.mark.parametrize("name", VAES)
def test_an_autoencoder_computes_what_pytorchs_does(golden, name):
    config = read_autoencoder_config(VAES[name])
    decoder, encoder = Network(lambda: AutoencoderDecoder(config)), Network(lambda: AutoencoderEncoder(config))
    image = run(decoder, inputs("latents", 1, 3, 4, config.latent_channels))
    assert error(image, golden[f"decoder/{name}"]) < 1e-4
    mean, log_variance = run(encoder, inputs("image", 1, 16, 24, 3))
    assert error(jnp.concatenate([mean, log_variance], axis=-1), golden[f"encoder/{name}"]) < 1e-4


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_computes_what_pytorchs_does(golden, name):
    config = dict(TEXTS[name])
    projection = config.pop("projection", False)
    network = Network(lambda: CLIPTextModel(CLIPTextConfig(**config), projection))
    states = run(network, np.array(TEXT_IDS, np.int32))
    # the last of PyTorch's hidden states has no final norm, as ours
    assert error(states.hidden_states, golden[f"text/{name}/hidden"]) < 1e-4
    assert error(states.last_hidden_state, golden[f"text/{name}/last"]) < 1e-4
    assert error(states.pooled, golden[f"text/{name}/pooled"]) < 1e-4


@pytest.mark.parametrize("name", CHECKERS)
def test_a_safety_checker_flags_what_pytorchs_does(golden, name):
    config = CLIPConfig(vision_config=CHECKERS[name]["vision_config"], projection_dim=CHECKERS[name]["projection_dim"])
    network = Network(lambda: SafetyChecker(config))
    params = random_params(network)
    params["concept_embeds_weights"] = np.full(17, 0.5, np.float32)
    params["special_care_embeds_weights"] = np.full(3, 0.2, np.float32)
    side = config.vision_config.image_size
    flags = jax.jit(network)(params, inputs("pixels", 8, side, side, 3))
    assert set(golden[f"checker/{name}"].tolist()) == {True, False}
    np.testing.assert_array_equal(flags, golden[f"checker/{name}"])


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_bfloat16_comes_near(golden, name):
    args, more = unet_inputs(UNETS[name])
    args[0], args[2] = jnp.asarray(args[0], jnp.bfloat16), jnp.asarray(args[2], jnp.bfloat16)
    out = run(make_unet(UNETS[name]), *args, dtype=jnp.bfloat16, **more)
    assert out.dtype == jnp.bfloat16
    wanted = golden[f"unet/{name}"]
    assert np.abs(np.asarray(out, np.float32) - wanted).mean() < 0.05 * wanted.std()


def test_a_parameter_that_is_missing_is_named():
    network = make_unet(UNETS["sd1"])
    params = random_params(network)
    del params["conv_in.bias"]
    args, _ = unet_inputs(UNETS["sd1"])
    with pytest.raises(KeyError, match=r"conv_in\.bias"):
        network(params, *args)
