"""The models against PyTorch's: golden outputs of tiny ones, names and shapes of real ones."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.network import Network
from tests.support import model_variants as variants
from tests.support.random_weights import random_tensor

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


def run(network: Network, params, *inputs, **named):
    """Run a network as a program that is compiled quickly: it runs once."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(network, compiler_options=options)(params, *inputs, **named)


def golden(kind: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"models-{kind}.npz") as arrays:
        return dict(arrays)


def draw_params(network: Network, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Return the weights that the oracle gave the same model, brought to our layout."""
    params = {}
    for name, shape in network.shapes.items():
        axes = network.torch_axes.get(name, tuple(range(len(shape))))
        torch_shape = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        params[name] = jnp.asarray(random_tensor(name, torch_shape).transpose(axes), dtype)
    return params


def error(got, wanted: np.ndarray) -> float:
    """Return the largest deviation, relative to the largest value of what is wanted."""
    assert got.shape == wanted.shape
    assert np.isfinite(wanted).all()
    assert wanted.std() > 1e-2
    return float(np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", variants.UNETS)
def test_a_unet_gives_what_pytorchs_gives(name):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    inputs = {key: jnp.asarray(value) for key, value in variants.unet_inputs(name).items()}
    got = run(network, draw_params(network), **inputs)
    assert error(got, golden("unet")[name]) < TOLERANCE


@pytest.mark.parametrize("name", variants.CLIPS)
def test_a_text_encoder_gives_what_pytorchs_gives(name):
    config = configs.read_clip_text_config(variants.CLIPS[name])
    network = networks.text_encoder(config, variants.has_projection(name))
    params, ids, wanted = draw_params(network), jnp.asarray(variants.clip_inputs(name)), golden("clip")
    states = run(network, params, ids)
    assert error(states.last_hidden_state, wanted[f"{name}/last_hidden_state"]) < TOLERANCE
    assert error(states.pooled, wanted[f"{name}/pooled"]) < TOLERANCE
    skipping = network(params, ids, skip=1)
    assert error(skipping.hidden_state, wanted[f"{name}/second_to_last"]) < TOLERANCE
    assert error(skipping.pooled, wanted[f"{name}/pooled"]) < TOLERANCE


@pytest.mark.parametrize("name", variants.VAES)
def test_an_autoencoder_gives_what_pytorchs_gives(name):
    config = configs.read_autoencoder_config(variants.VAES[name])
    inputs, wanted = variants.vae_inputs(name), golden("vae")
    decoder, encoder = networks.decoder(config), networks.encoder(config)
    image = run(decoder, draw_params(decoder), inputs["latents"])
    moments = run(encoder, draw_params(encoder), inputs["image"])
    assert error(image, wanted[f"{name}/image"]) < TOLERANCE
    assert error(moments.mean, wanted[f"{name}/mean"]) < TOLERANCE
    assert error(moments.logvar, wanted[f"{name}/logvar"]) < TOLERANCE


def test_the_safety_checker_flags_what_pytorchs_flags():
    network = networks.safety_checker(configs.read_safety_checker_config(variants.SAFETY_CHECKER))
    wanted = golden("safety")
    got = network(draw_params(network), jnp.asarray(variants.safety_inputs()))
    assert 5 < wanted["flags"].sum() < 59
    np.testing.assert_array_equal(got, wanted["flags"])
