"""What a loop's body makes of the parameters alone is made once, before the loop, and the rest gives the same."""

from __future__ import annotations

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker import GenerationRequest
from sdtpu_worker.diffusion import denoising
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.hoisting import hoist
from sdtpu_worker.diffusion.start import make_warm_engine
from sdtpu_worker.models.selection import Selection
from tests.support.engines import generate_all


def primitives(function, *args):
    """Return how the operations of a traced function are called."""
    return [each.primitive.name for each in jax.make_jaxpr(function)(*args).jaxpr.eqns]


def dense(params, x):
    weight = jnp.pad(params["weight"].astype(jnp.float32), ((0, 0), (0, 2)))
    return jnp.tanh(x @ weight + params["bias"]), x.sum()


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"weight": jax.random.normal(keys[0], (8, 6), jnp.bfloat16), "bias": jax.random.normal(keys[1], (8,))}


def test_the_rest_gives_the_same_and_has_no_work_on_the_parameters_left(params):
    x = jnp.linspace(-1, 1, 32).reshape(4, 8)
    rest = hoist(dense, params, x)
    for got, wanted in zip(rest(2 * x), dense(params, 2 * x), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert set(primitives(dense, params, x)) >= {"convert_element_type", "dot_general"}
    left = primitives(rest, x)
    assert "dot_general" in left
    assert not {"convert_element_type", "pad", "jit"} & set(left)


def test_in_a_loop_the_parameters_are_worked_on_outside(params):
    def loop(params, x, wanted):
        rest = hoist(dense, params, x)
        return jax.lax.fori_loop(0, wanted, lambda _, x: rest(x)[0], x)

    x = jnp.linspace(-1, 1, 32).reshape(4, 8)
    expected = dense(params, dense(params, x)[0])[0]
    np.testing.assert_allclose(jax.jit(loop)(params, x, 2), expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(loop)(params, x, 0), x)
    (while_loop,) = (each for each in jax.make_jaxpr(loop)(params, x, 2).jaxpr.eqns if each.primitive.name == "while")
    body = {each.primitive.name for each in while_loop.params["body_jaxpr"].jaxpr.eqns}
    assert "dot_general" in body
    assert not {"convert_element_type", "pad"} & body


def test_what_is_closed_over_stays_an_argument_and_constants_stay_in_the_loop(params):
    scale = jnp.arange(8.0)

    def scaled(params, x):
        grid = jnp.arange(8.0)  # of nothing: cheaper to make again than to keep
        return x * scale * 2 + grid * params["bias"]

    @jax.jit
    def both(scale, x):
        rest = hoist(lambda params, x: x * scale * 2 + params["bias"], params, x)
        return rest(x)

    x = jnp.ones(8)
    np.testing.assert_allclose(both(scale, x), x * scale * 2 + params["bias"], rtol=1e-6)
    rest = hoist(scaled, params, x)
    np.testing.assert_array_equal(rest(x), scaled(params, x))
    assert "iota" in primitives(rest, x)


def test_what_makes_far_more_than_it_takes_stays_in_the_loop(params):
    def wide(params, x):
        return x + jnp.broadcast_to(params["bias"][:, None], (8, 100))

    x = jnp.ones((8, 100))
    rest = hoist(wide, params, x)
    np.testing.assert_array_equal(rest(x), wide(params, x))
    assert "broadcast_in_dim" in primitives(rest, x)


def test_scopes_and_conditionals_come_through(params):
    def choosing(params, x):
        with jax.named_scope("inner"):
            return jax.lax.cond(x.sum() > 0, lambda: x * params["bias"].astype(jnp.float32), lambda: x)

    x = jnp.ones(8)
    rest = hoist(choosing, params, x)
    np.testing.assert_array_equal(rest(x), choosing(params, x))
    np.testing.assert_array_equal(rest(-x), -x)
    assert "inner/cond" in jax.jit(rest).lower(x).as_text(debug_info=True)


def test_an_engine_draws_the_same_pictures_with_it(monkeypatch, random_checkpoint, devices, compile_cache):
    requests = [
        GenerationRequest("a fox", seed=seed, num_inference_steps=3 + seed, guidance_scale=4) for seed in range(2)
    ]

    def draw():
        checkpoint = load_checkpoint(str(random_checkpoint))
        engine = make_warm_engine(checkpoint, devices[:1], 1, None, compile_cache)
        return [np.asarray(image.pixels).astype(int) for image in generate_all(engine, requests)]

    expected = draw()
    hoisting = Mock(side_effect=hoist)
    monkeypatch.setattr(denoising, "current_selection", lambda: Selection("tpu"))
    monkeypatch.setattr(denoising, "hoist", hoisting)
    for got, wanted in zip(draw(), expected, strict=True):
        assert np.abs(got - wanted).max() <= 1
    hoisting.assert_called()
