"""The kernels of TPUs, in the interpreter: every way to compute gives what the plain layers give."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.attention import Attention, attention, merge_attentions, split_heads
from sdtpu_worker.models.attention.layer import block_of_queries
from sdtpu_worker.models.attention.tpu_kernel import LANES, Packing, packed_attention
from sdtpu_worker.models.kernel_table import (
    Implementation,
    Row,
)
from sdtpu_worker.models.layers import GroupNorm, LayerNorm
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.selection import Selection, selecting
from sdtpu_worker.models.transformer import FeedForward
from tests.device.test_models import TOLERANCE, draw_params, error, golden
from tests.support import model_variants as variants

PACKED_EVERYWHERE = (Row("*", Implementation.PACKED, "for tests", block_queries=32),)
# Heads and their size: three of Stable Diffusion 1.x, that of 2.x and XL, one that fills the lanes, many small ones.
HEADS = [(8, 40), (2, 80), (2, 160), (5, 64), (1, 128), (9, 16)]


def interpreted() -> Selection:
    """Return a selection of the TPU's kernel for every attention, in the interpreter."""
    return Selection("tpu", interpret=True, table=PACKED_EVERYWHERE)


def draw(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(q, k, v, heads: int, with_lse: bool = False):
    """Return the plain attention of arrays `(B, L, heads · dim)`."""
    return attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), with_lse=with_lse)


def pack_keys_and_values(packing: Packing, k, v) -> tuple[jax.Array, jax.Array]:
    """Return keys and values as the kernel takes them, with keys of zeros behind that fill the tile."""
    spare = ((0, 0), (0, -k.shape[1] % LANES), (0, 0))
    return jnp.pad(packing.pack(k), spare), jnp.pad(packing.pack(v) + packing.ones(v.dtype), spare)


@pytest.mark.parametrize(("heads", "dim"), HEADS)
@pytest.mark.parametrize("num_keys", [128, 77])
def test_the_kernel_gives_what_the_plain_attention_gives(heads, dim, num_keys):
    packing = Packing(heads, dim, is_even=True)
    q, k, v = draw(0, 2, 32, heads * dim), draw(1, 2, num_keys, heads * dim), draw(2, 2, num_keys, heads * dim)
    packed = packing.pack(q), *pack_keys_and_values(packing, k, v)
    got, lse = packed_attention(
        *packed, packing=packing, num_keys=num_keys, block_queries=16, with_lse=True, interpret=True
    )
    wanted, wanted_lse = plain(q, k, v, heads, with_lse=True)
    np.testing.assert_allclose(packing.unpack(got), wanted.reshape(q.shape), atol=2e-6, rtol=0)
    in_every_lane = jnp.broadcast_to(wanted_lse, wanted.shape).reshape(q.shape)
    np.testing.assert_allclose(packing.unpack(lse), in_every_lane, atol=1e-5, rtol=0)
    assert (packing.pack(packing.unpack(got)) == got).all(), "lanes of no head must be zeros, or they reach the output"


def test_the_kernel_gives_in_bfloat16_what_the_plain_attention_gives_within_its_rounding():
    packing = Packing(8, 40, is_even=True)
    q, k, v = (draw(seed, 2, 128, 320, dtype=jnp.bfloat16) for seed in range(3))
    got = packed_attention(
        packing.pack(q), *pack_keys_and_values(packing, k, v), packing=packing, block_queries=64, interpret=True
    )
    wanted = plain(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), heads=8).reshape(q.shape)
    difference = np.abs(np.asarray(packing.unpack(got), np.float32) - wanted)
    assert difference.max() < 2**-7
    assert difference.mean() < 2**-10


def test_a_row_has_the_same_result_at_every_place_of_the_batch():
    packing = Packing(5, 64, is_even=True)
    q, k, v = (draw(seed, 3, 32, 320, dtype=jnp.bfloat16) for seed in range(3))

    def attend(*rows):
        return packed_attention(
            packing.pack(rows[0]), *pack_keys_and_values(packing, rows[1], rows[2]), packing=packing, block_queries=16,
            num_keys=32, interpret=True,
        )  # fmt: skip

    together = attend(q, k, v)
    turned = attend(*(jnp.roll(x, 1, axis=0) for x in (q, k, v)))
    assert (jnp.roll(together, 1, axis=0) == turned).all()


def test_a_block_that_does_not_divide_the_queries_is_an_error_and_not_silence():
    packing, q = Packing(1, 64), draw(0, 1, 48, 128)
    with pytest.raises(ValueError, match="block_queries must divide the 48 queries, got 32"):
        packed_attention(q, q, q, packing=packing, block_queries=32, interpret=True)


@pytest.mark.parametrize(
    ("heads", "dim", "groups"),
    [(8, 40, (2, 4)), (5, 64, (1, 5)), (20, 64, (2, 10)), (7, 16, (7, 1)), (11, 16, (1, 11))],
)
def test_in_an_even_packing_all_groups_hold_the_same_number_of_heads(heads, dim, groups):
    packing = Packing(heads, dim, is_even=True)
    assert (packing.heads_per_group, packing.groups) == groups
    assert packing.heads_of_last == packing.heads_per_group


@pytest.mark.parametrize(
    ("num_queries", "most", "block"),
    [
        (4096, 512, 512),
        (9216, 256, 256),
        (2304, 512, 384),
        (1600, 256, 160),
        (576, 512, 288),
        (520, 512, 272),
        (40, 512, 48),
    ],
)
def test_a_step_takes_a_number_of_queries_that_leaves_nothing_to_fill_up_where_there_is_one(num_queries, most, block):
    assert block_of_queries(num_queries, most) == block


def test_an_uneven_packing_is_refused_by_the_kernel_that_has_one_group_in_a_step():
    packing, q = Packing(8, 40), draw(0, 1, 32, 384)
    with pytest.raises(ValueError, match="all groups must hold the same number of heads"):
        packed_attention(q, q, q, packing=packing, block_queries=32, interpret=True)


@pytest.mark.parametrize("is_packed", [False, True])
def test_attentions_to_two_sets_of_keys_merge_into_the_attention_to_both(is_packed):
    heads, dim = 8, 40
    packing = Packing(heads, dim, is_even=True)
    q, k, v = draw(0, 2, 32, 320), draw(1, 2, 154, 320), draw(2, 2, 154, 320)

    def attend(window: slice):
        if not is_packed:
            return plain(q, k[:, window], v[:, window], heads, with_lse=True)
        keys_values = pack_keys_and_values(packing, k[:, window], v[:, window])
        return packed_attention(
            packing.pack(q), *keys_values, packing=packing, num_keys=77, block_queries=32, with_lse=True, interpret=True
        )

    out, _ = merge_attentions(attend(slice(0, 77)), attend(slice(77, 154)))
    got = packing.unpack(out) if is_packed else out.reshape(q.shape)
    wanted = plain(q, k, v, heads).reshape(q.shape)
    np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)


def run_layer(heads: int, dim: int, bias: bool, x, context, selection: Selection, loras=()) -> jax.Array:
    """Run a layer with drawn parameters, and drawn LoRAs at some of its projections."""
    network = Network(lambda: Attention(heads * dim, context.shape[-1], heads, bias))
    params = {name: draw(seed, *shape) * shape[0] ** -0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    adapters = {
        name: (draw(20 + seed, len(x), network.shapes[name][0], 4) * 0.05, draw(30 + seed, len(x), 4, heads * dim))
        for seed, name in enumerate(loras)
    }

    def run(x, context, adapters):
        # The same array for both is how a layer knows that it attends to its own input.
        return network(params, x, x if context is None else context, adapters=adapters)

    with selecting(selection):
        return jax.jit(run)(x, None if context is x else context, adapters)


@pytest.mark.parametrize(
    ("heads", "dim", "bias", "tokens", "of_prompt"),
    [
        (8, 40, False, 64, False),
        (8, 40, False, 45, False),
        (8, 40, False, 64, True),
        (8, 40, True, 45, True),
        (3, 64, True, 45, False),
        (2, 80, True, 45, False),
    ],
)
def test_a_packed_layer_gives_what_the_plain_one_gives(heads, dim, bias, tokens, of_prompt):
    x = draw(9, 2, tokens, heads * dim)
    context = draw(10, 2, 77, 24) if of_prompt else x
    wanted = run_layer(heads, dim, bias, x, context, Selection("cpu"))
    got = run_layer(heads, dim, bias, x, context, interpreted())
    assert error(got, np.asarray(wanted)) < 1e-5


@pytest.mark.parametrize("of_prompt", [False, True])
@pytest.mark.parametrize(
    "loras", [("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"), ("to_v.weight",), ("to_out.0.weight",)]
)
def test_a_packed_layer_takes_the_loras_of_each_row(loras, of_prompt):
    x = draw(9, 2, 32, 320)
    context = draw(10, 2, 77, 24) if of_prompt else x
    without = run_layer(8, 40, False, x, context, Selection("cpu"))
    wanted = run_layer(8, 40, False, x, context, Selection("cpu"), loras)
    assert error(without, np.asarray(wanted)) > 1e-2
    got = run_layer(8, 40, False, x, context, interpreted(), loras)
    assert error(got, np.asarray(wanted)) < 1e-5


@pytest.mark.parametrize(("name", "fuses"), [("sd1", False), ("sd2", True)])
def test_a_unet_with_packed_attention_gives_what_pytorchs_gives(name, fuses):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    inputs = {key: jnp.asarray(value) for key, value in variants.unet_inputs(name).items()}
    table = (replace(PACKED_EVERYWHERE[0], fused=(100 * fuses, 100)),)
    with selecting(replace(interpreted(), table=table)) as selection:
        got = jax.jit(lambda params: network(params, **inputs))(draw_params(network))
    assert {choice.implementation for choice in selection.chosen.values()} == {Implementation.PACKED}
    assert error(got, golden("unet")[name]) < TOLERANCE


class AttentionLayer(nnx.Module):
    """An attention with its norm and shortcut."""

    def __init__(self, heads: int, dim: int, prompt: int) -> None:
        features = heads * dim
        self.norm, self.attention = LayerNorm(features), Attention(features, prompt or features, heads)

    def __call__(self, x, context):
        return self.attention.beside_shortcut(x, self.norm, context)


@pytest.mark.parametrize(
    ("heads", "dim", "tokens", "of_prompt"),
    [(8, 40, 64, False), (8, 40, 45, True), (5, 64, 45, False), (2, 80, 64, True)],
)
def test_an_attention_fused_with_its_projections_gives_what_the_layers_give(heads, dim, tokens, of_prompt):
    x, context = draw(9, 2, tokens, heads * dim), draw(10, 2, 77, 24) if of_prompt else None
    network = Network(lambda: AttentionLayer(heads, dim, 24 if of_prompt else 0))
    params = {name: draw(seed, *shape) * shape[0] ** -0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    wanted = network(params, x, context)
    fused = (replace(PACKED_EVERYWHERE[0], fused=(100, 100)),)
    with selecting(replace(interpreted(), table=fused)) as selection:
        got = jax.jit(lambda x: network(params, x, context))(x)
    assert all(choice.fuses for choice in selection.chosen.values())
    assert error(got, np.asarray(wanted)) < 1e-5


@pytest.mark.parametrize(("lora", "kernels"), [("", 2), ("attention.to_k.weight", 1), ("attention.to_v.weight", 1)])
def test_keys_and_values_are_a_kernel_with_their_norm_but_for_loras(lora, kernels):
    x, network = draw(9, 2, 32, 320), Network(lambda: AttentionLayer(8, 40, 0))
    params = {name: draw(seed, *shape) * shape[0] ** -0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    loras = {lora: (draw(20, 2, 320, 4) * 0.05, draw(21, 2, 4, 320))} if lora else {}

    def run(x, loras):
        return network(params, x, None, adapters=loras)

    wanted = jax.jit(run)(x, loras)
    fused = (replace(PACKED_EVERYWHERE[0], fused=(100, 100)),)
    with selecting(replace(interpreted(), table=fused, key_block_rows=lambda *_: 16)):
        traced = jax.jit(lambda *arguments: run(*arguments)).trace(x, loras)
    assert str(traced.jaxpr).count("pallas_call[") == kernels
    assert error(traced.lower().compile()(x, loras), np.asarray(wanted)) < 1e-5


@pytest.mark.parametrize("layer", ["attention.to_q.weight", "attention.to_out.0.weight", "attention.to_v.weight"])
def test_a_fused_attention_takes_loras_or_is_not_fused(layer):
    x, network = draw(9, 2, 32, 320), Network(lambda: AttentionLayer(8, 40, 0))
    params = {name: draw(seed, *shape) * 0.2 for seed, (name, shape) in enumerate(network.shapes.items())}
    params["norm.weight"] = jnp.ones(320)
    loras = {layer: (draw(20, 2, 320, 4) * 0.05, draw(21, 2, 4, 320))}

    def run(x, loras):
        return network(params, x, None, adapters=loras)

    wanted = jax.jit(run)(x, loras)
    fused = (replace(PACKED_EVERYWHERE[0], fused=(100, 100)),)
    with selecting(replace(interpreted(), table=fused)):
        got = jax.jit(lambda *arguments: run(*arguments))(x, loras)
    assert error(got, np.asarray(wanted)) < 1e-5
    assert error(jax.jit(run)(x, {}), np.asarray(wanted)) > 1e-3


class DenseLayers(nnx.Module):
    """Dense layers with their norm and shortcut."""

    def __init__(self) -> None:
        self.norm, self.ff = LayerNorm(40), FeedForward(40)

    def __call__(self, x):
        return self.ff.beside_shortcut(x, self.norm)


def run_dense_layers(x, selection: Selection, loras=()) -> jax.Array:
    """Run dense layers with drawn parameters, and drawn LoRAs at some of them."""
    network = Network(DenseLayers)
    params = {name: draw(seed, *shape) * 40**-0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    adapters = {}
    for seed, name in enumerate(loras):
        inner, outer = network.shapes[name]
        adapters[name] = draw(20 + seed, len(x), inner, 4) * 0.1, draw(30 + seed, len(x), 4, outer)
    with selecting(selection):
        return jax.jit(lambda x, adapters: network(params, x, adapters=adapters))(x, adapters)


@pytest.mark.parametrize("tokens", [64, 45])
def test_dense_layers_as_one_kernel_give_what_the_layers_give(tokens):
    x = draw(9, 2, tokens, 40)
    got = run_dense_layers(x, replace(interpreted(), dense_block_rows=lambda *_: 32))
    assert error(got, np.asarray(run_dense_layers(x, Selection("cpu")))) < 1e-6


@pytest.mark.parametrize("layer", ["ff.net.0.proj.weight", "ff.net.2.weight"])
def test_dense_layers_with_loras_are_layers_as_everywhere(layer):
    x = draw(9, 2, 32, 40)
    wanted = run_dense_layers(x, Selection("cpu"), [layer])
    got = run_dense_layers(x, replace(interpreted(), dense_block_rows=lambda *_: 32), [layer])
    assert (got == wanted).all()
    assert error(run_dense_layers(x, Selection("cpu")), np.asarray(wanted)) > 1e-2


def test_a_group_norm_by_channel_gives_what_the_norm_gives():
    network = Network(lambda: GroupNorm(4, 24, 1e-5))
    params = {"weight": draw(0, 24), "bias": draw(1, 24)}
    x = 3 * draw(2, 2, 5, 7, 24) + 10 * draw(3, 24)  # channels with means of their own
    wanted = network(params, x)
    with selecting(Selection("tpu")):
        got = network(params, x)
    assert error(got, np.asarray(wanted)) < 1e-6


@pytest.mark.parametrize("mean", [0, 3, 100])
def test_a_layer_norm_in_one_look_gives_what_the_norm_gives_of_bfloat16(mean):
    network = Network(lambda: LayerNorm(320))
    params = {"weight": draw(0, 320), "bias": draw(1, 320)}
    x = (3 * draw(2, 2, 7, 320) + mean).astype(jnp.bfloat16)
    with selecting(Selection("tpu")):
        got = network(params, x)
    assert error(got.astype(jnp.float32), np.asarray(network(params, x.astype(jnp.float32)))) < 2**-7


def test_in_float32_a_layer_norm_looks_twice_everywhere():
    network = Network(lambda: LayerNorm(320))
    params = {"weight": draw(0, 320), "bias": draw(1, 320)}
    x = draw(2, 2, 7, 320) + 2**12  # float32 has half of the sum's bits left for the variance
    with selecting(Selection("tpu")):
        got = network(params, x)
    np.testing.assert_array_equal(got, network(params, x))


def test_a_gpu_gets_cudnns_attention_and_the_same_result(monkeypatch):
    asked = []

    def instead(q, k, v, implementation):
        asked.append(implementation)
        return real(q, k, v, implementation="xla")

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    x = draw(9, 2, 512, 64).astype(jnp.bfloat16)
    wanted = run_layer(2, 32, False, x, x, Selection("cpu"))
    assert not asked
    got = run_layer(2, 32, False, x, x, Selection("gpu"))
    assert asked == ["cudnn"]
    assert error(got.astype(jnp.float32), np.asarray(wanted, np.float32)) < 2**-6
