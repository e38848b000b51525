"""Prompts of several windows on a TPU, in the interpreter: the right pixels, and the same ones in any company."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdtpu_worker.models.attention import Attention, attention, split_heads
from sdtpu_worker.models.attention.fused_kernel import fused_attention
from sdtpu_worker.models.attention.tpu_kernel import Packing, packed_attention
from sdtpu_worker.models.kernel_table import TABLE, Implementation, Row, Shape
from sdtpu_worker.models.layers import LayerNorm
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.prompt_windows import PromptWindows, add_attention_to_prompt
from sdtpu_worker.models.selection import Selection, selecting
from tests.device.test_models import error

LENGTH, MOST = 77, 3
COUNTS = [1, 3, 2, 1]
KERNELS = (Row("*", Implementation.PACKED, "for tests", block_queries=32, counts_keys=True),)
WAYS = {
    "kernels": Selection("tpu", interpret=True, table=KERNELS),
    "kernels with projections": Selection("tpu", interpret=True, table=(replace(KERNELS[0], fused=(100, 1000)),)),
    "few pixels": Selection("tpu"),
}
"""The ways in which a TPU attends to the windows of prompts."""


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class AttentionToPrompt(nnx.Module):
    """An attention to prompts with its norm and shortcut."""

    def __init__(self, heads: int, dim: int) -> None:
        features = heads * dim
        self.norm, self.attention = LayerNorm(features), Attention(features, 24, heads)

    def __call__(self, x, context):
        return add_attention_to_prompt(self.attention, x, self.norm, context)


def run(selection: Selection, x, context, heads: int = 8, loras=()):
    """Run the layer with drawn parameters and a LoRA for each row."""
    network = Network(lambda: AttentionToPrompt(heads, x.shape[-1] // heads))
    params = {name: draw(seed, *shape) * shape[0] ** -0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    with selecting(selection):
        return jax.jit(lambda x, context, adapters: network(params, x, context, adapters=adapters))(
            x, context, dict(loras)
        )


def make_inputs(features: int = 320, counts=COUNTS):
    batch = len(counts)
    context = PromptWindows(
        draw(1, batch, LENGTH, 24), draw(2, batch, MOST - 1, LENGTH, 24), jnp.asarray(counts, jnp.int32)
    )
    return draw(3, batch, 64, features), context


def take(tree, row: int):
    return jax.tree.map(lambda leaf: leaf[row : row + 1], tree)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "features"), [(8, 320), (5, 320)])
def test_every_row_attends_to_all_windows_of_its_own_prompt(way, heads, features):
    x, context = make_inputs(features)
    got = run(WAYS[way], x, context, heads)
    for row, count in enumerate(COUNTS):
        windows = jnp.concatenate([context.first[row], *context.further[row, : count - 1]])[None]
        wanted = run(Selection("cpu"), x[row : row + 1], windows, heads)
        assert error(got[row], np.asarray(wanted[0])) < 1e-5
    by_conditional = run(Selection("cpu"), x, context, heads)
    assert error(got, np.asarray(by_conditional)) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_a_row_has_the_same_pixels_whatever_prompts_its_neighbours_have(way):
    x, context = make_inputs()
    seen: dict[tuple[int, int], jax.Array] = {}
    for counts in (COUNTS, [1, 1, 2, 3], [3, 3, 2, 1]):
        got = run(WAYS[way], x, context._replace(counts=jnp.asarray(counts, jnp.int32)))
        for row, count in enumerate(counts):
            np.testing.assert_array_equal(got[row], seen.setdefault((row, count), got[row]))
    assert (seen[0, 1] != seen[0, 3]).any()
    assert (seen[1, 1] != seen[1, 3]).any()


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_that_never_had_a_job_gives_numbers(way):
    x, context = make_inputs()
    got = [run(WAYS[way], x, context._replace(counts=jnp.asarray(counts, jnp.int32)))
           for counts in ([0, 3, 2, 0], COUNTS)]  # fmt: skip
    np.testing.assert_array_equal(*got)
    assert jnp.isfinite(got[0]).all()


@pytest.mark.parametrize("way", ["kernels", "kernels with projections"])
def test_a_row_has_the_same_pixels_at_every_place_and_alone(way):
    x, context = make_inputs()
    together = run(WAYS[way], x, context)
    turned = run(WAYS[way], *jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), (x, context)))
    np.testing.assert_array_equal(jnp.roll(together, 1, axis=0), turned)


@pytest.mark.parametrize("way", WAYS)
def test_loras_of_each_row_hold_for_all_windows(way):
    x, context = make_inputs()
    loras = {}
    for seed, (layer, inner) in enumerate({"to_q": 320, "to_k": 24, "to_v": 24, "to_out.0": 320}.items()):
        loras[f"attention.{layer}.weight"] = draw(20 + seed, len(x), inner, 4) * 0.05, draw(30 + seed, len(x), 4, 320)
    wanted = run(Selection("cpu"), x, context, loras=loras)
    assert error(run(WAYS[way], x, context, loras=loras), np.asarray(wanted)) < 1e-5
    assert error(run(WAYS[way], x, context), np.asarray(wanted)) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_no_conditional_is_left_for_the_compiler(way):
    x, context = make_inputs()
    network = Network(lambda: AttentionToPrompt(8, 40))
    params = {name: jnp.zeros(shape) for name, shape in network.shapes.items()}

    def conditionals(selection: Selection) -> int:
        with selecting(selection):
            jaxpr = jax.make_jaxpr(lambda x, context: network(params, x, context))(x, context).jaxpr
        return sum(each.primitive.name == "cond" for each in jaxpr.eqns)

    assert conditionals(Selection("cpu")) == 1
    assert conditionals(WAYS[way]) == 0


@pytest.mark.parametrize("dim", [40, 128])
def test_what_lies_behind_the_keys_that_count_is_not_looked_at(dim):
    packing = Packing(8, dim, is_even=True)
    counts = [77, 231, 154, 128, 129]
    q, k, v = (draw(seed, len(counts), tokens, packing.width) for seed, tokens in enumerate((32, 231, 231)))
    behind = jnp.arange(231)[None, :, None] >= jnp.asarray(counts)[:, None, None]
    nothing = jnp.where(behind, jnp.nan, 0)

    def attend(k, v):
        return packed_attention(
            q, k, v, packing, num_keys=jnp.asarray(counts, jnp.int32), block_queries=16, with_lse=True, interpret=True
        )

    got, lse = attend(k + nothing, v + nothing)
    for of_numbers, of_nothing in zip(attend(k, v), (got, lse), strict=True):
        np.testing.assert_array_equal(packing.unpack(of_numbers), packing.unpack(of_nothing))
    q, k, v = (split_heads(packing.unpack(each), 8) for each in (q, k, v))
    for row, count in enumerate(counts):
        own = slice(row, row + 1)
        wanted, wanted_lse = attention(q[own], k[own, :count], v[own, :count], with_lse=True)
        np.testing.assert_allclose(packing.unpack(got)[row], wanted.reshape(32, -1), atol=2e-6, rtol=0)
        in_every_lane = jnp.broadcast_to(wanted_lse, wanted.shape).reshape(32, -1)
        np.testing.assert_allclose(packing.unpack(lse)[row], in_every_lane, atol=1e-5, rtol=0)


def test_the_plain_attention_looks_at_the_keys_that_count():
    q, k, v = draw(0, 3, 16, 2, 8), draw(1, 3, 20, 2, 8), draw(2, 3, 20, 2, 8)
    got = attention(q, k, v, counts=jnp.asarray([7, 20, 1]))
    for row, count in enumerate([7, 20, 1]):
        wanted = attention(*(each[row : row + 1] for each in (q, k[:, :count], v[:, :count])))
        np.testing.assert_allclose(got[row], wanted[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("platform", "wanted", "pixels", "dtype", "counts_keys"),
    [
        ("tpu", "auto", 4096, "bfloat16", True),
        ("tpu", "auto", 256, "bfloat16", True),
        ("tpu", "plain", 256, "bfloat16", True),
        ("tpu", "plain", 4096, "bfloat16", False),  # scores of all windows would pass through memory in every step
        ("tpu", "auto", 4096, "float32", False),
        ("cpu", "auto", 256, "float32", False),
        ("gpu", "auto", 4096, "bfloat16", False),
    ],
)
def test_the_table_says_who_is_given_all_windows_at_once(platform, wanted, pixels, dtype, counts_keys):
    selection = Selection(platform, wanted)
    assert selection.counts_keys(Shape(pixels, MOST * LENGTH, 8, 40, dtype)) is counts_keys
    assert not selection.chosen, "a question is no choice, and is not logged"
    assert TABLE[-1].counts_keys is False


def test_a_fused_block_that_does_not_divide_the_queries_is_an_error_and_not_silence():
    x, packing = draw(0, 1, 48, 64), Packing(1, 64)
    with pytest.raises(ValueError, match="block_queries must divide the 48 queries, got 32"):
        fused_attention(
            x, x[0, 0], x[0, 0], x[0], x, x, x[0], x[0, 0], packing, eps=1e-5, num_keys=48, block_queries=32,
            interpret=True,
        )  # fmt: skip
