"""The models against PyTorch's: golden outputs of tiny ones, names and shapes of real ones."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.layout import axes_from_pytorch
from sdtpu_worker.models.network import Network
from tests.support import model_variants as variants
from tests.support.random_weights import random_weights

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
    drawn = random_weights(network.torch_shapes)
    axes = network.torch_axes
    return {
        name: jnp.asarray(tensor.transpose(axes[name]) if name in axes else tensor, dtype)
        for name, tensor in drawn.items()
    }


def error(got, wanted: np.ndarray) -> float:
    """Return the largest deviation, relative to the largest value of what is wanted."""
    assert got.shape == wanted.shape
    assert np.isfinite(wanted).all()
    assert wanted.std() > 1e-2
    return float(np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max())


def mean_error(got, wanted: np.ndarray) -> float:
    """Return the mean deviation, relative to the standard deviation of what is wanted."""
    return float(np.abs(np.asarray(got, np.float64) - wanted).mean() / wanted.std())


@pytest.mark.parametrize("name", variants.UNETS)
def test_the_rule_of_the_layout_is_what_the_layers_say(name):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    for tensor, shape in network.shapes.items():
        assert axes_from_pytorch(tensor, len(shape)) == network.torch_axes.get(tensor), tensor


@pytest.mark.parametrize("name", variants.UNETS)
def test_a_unet_gives_what_pytorchs_gives(name):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    inputs = {key: jnp.asarray(value) for key, value in variants.unet_inputs(name).items()}
    got = run(network, draw_params(network), **inputs)
    assert error(got, golden("unet")[name]) < TOLERANCE


@pytest.mark.parametrize("name", variants.CONTROLNETS)
def test_a_controlnet_gives_what_pytorchs_gives(name):
    network = networks.controlnet(configs.read_controlnet_config(variants.CONTROLNETS[name]))
    params, inputs = draw_params(network), variants.controlnet_inputs(name)
    embedded = network(params, inputs.pop("picture"), method="embed")
    got = run(network, params, **inputs, embedded=embedded)
    wanted = golden("controlnet")
    for i, residual in enumerate([*got.down, got.mid]):
        assert error(residual, wanted[f"{name}/{i}"]) < TOLERANCE
    assert f"{name}/{i + 1}" not in wanted


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


@pytest.mark.parametrize("name", variants.TINY_VAES)
def test_a_tiny_autoencoder_gives_what_pytorchs_gives(name):
    config = configs.read_autoencoder_config(variants.TINY_VAES[name])
    inputs, wanted = variants.vae_inputs(name), golden("tiny-vae")
    decoder, encoder = networks.decoder(config), networks.encoder(config)
    assert error(run(decoder, draw_params(decoder), inputs["latents"]), wanted[f"{name}/image"]) < TOLERANCE
    moments = run(encoder, draw_params(encoder), inputs["image"])
    assert error(moments.mean, wanted[f"{name}/latents"]) < TOLERANCE
    assert (moments.logvar == -30).all()


def test_the_safety_checker_flags_what_pytorchs_flags():
    network = networks.safety_checker(configs.read_safety_checker_config(variants.SAFETY_CHECKER))
    wanted = golden("safety")
    got = network(draw_params(network), jnp.asarray(variants.safety_inputs()))
    assert 5 < wanted["flags"].sum() < 59
    np.testing.assert_array_equal(got, wanted["flags"])


@pytest.mark.parametrize("name", ["sd1", "xl-lcm"])
def test_a_unet_in_bfloat16_differs_by_its_rounding_alone(name):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    got = run(network, draw_params(network, jnp.bfloat16), **variants.unet_inputs(name))
    assert got.dtype == jnp.bfloat16
    assert mean_error(got, golden("unet")[name]) < 0.03


def test_text_encoder_and_autoencoder_run_in_bfloat16():
    text = networks.text_encoder(configs.read_clip_text_config(variants.CLIPS["clip-projection"]), projection=True)
    states = run(text, draw_params(text, jnp.bfloat16), variants.clip_inputs("clip-projection"))
    assert {state.dtype for state in states} == {jnp.dtype(jnp.bfloat16)}
    assert mean_error(states.pooled, golden("clip")["clip-projection/pooled"]) < 0.03
    decoder = networks.decoder(configs.read_autoencoder_config(variants.VAES["vae"]))
    image = run(decoder, draw_params(decoder, jnp.bfloat16), variants.vae_inputs("vae")["latents"])
    assert image.dtype == jnp.bfloat16
    assert mean_error(image, golden("vae")["vae/image"]) < 0.03


def test_a_network_takes_the_parameters_that_it_needs_out_of_more():
    network = networks.decoder(configs.read_autoencoder_config(variants.VAES["vae"]))
    params, latents = draw_params(network), variants.vae_inputs("vae")["latents"]
    more = {**params, "encoder.conv_in.bias": jnp.zeros(8)}
    np.testing.assert_array_equal(run(network, more, latents), run(network, params, latents))
    del params["decoder.conv_in.bias"]
    with pytest.raises(KeyError, match=r"decoder\.conv_in\.bias"):
        network(params, latents)


def test_a_network_runs_sharded_under_strict_promotion(devices):
    network = networks.unet(configs.read_unet_config(variants.UNETS["xl-lcm"]))
    params, inputs = draw_params(network, jnp.bfloat16), variants.unet_inputs("xl-lcm")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), "d")
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.shard_map(
        lambda params, inputs: network(params, **inputs),
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), spec),
        out_specs=spec,
        check_vma=False,
    )
    with jax.numpy_dtype_promotion("strict"):
        shape = jax.eval_shape(sharded, params, {key: jnp.asarray(value) for key, value in inputs.items()})
    assert shape.shape == inputs["sample"].shape


def test_a_controlnets_residuals_are_added_to_what_goes_across():
    network = networks.unet(configs.read_unet_config(variants.UNETS["sd1"]))
    params, inputs = draw_params(network), variants.unet_inputs("sd1")
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 4, 4, 8), (2, 4, 4, 16)]
    nothing = {"down_residuals": [jnp.zeros(shape) for shape in shapes], "mid_residual": jnp.zeros((2, 4, 4, 16))}
    something = jax.tree.map(lambda leaf: leaf + 1, nothing)
    plain = run(network, params, **inputs)
    np.testing.assert_allclose(run(network, params, **inputs, **nothing), plain, atol=1e-5)
    assert np.abs(run(network, params, **inputs, **something) - plain).max() > 0.1


def test_xl_without_its_pooled_prompt_is_an_error():
    network = networks.unet(configs.read_unet_config(variants.UNETS["xl"]))
    inputs = variants.unet_inputs("xl")
    del inputs["text_embeds"]
    with pytest.raises(ValueError, match="needs text_embeds and time_ids"):
        network(draw_params(network), **inputs)
