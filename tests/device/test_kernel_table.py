"""What the table of kernels chooses, who is told, and what depends on it."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from sdtpu_worker.diffusion.programs import lower_tick
from sdtpu_worker.diffusion.sharding import REPLICATED, make_mesh, put
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.diffusion.snapshot import fingerprint_of
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.image_kernel_table import convolution_block, projection_block_pixels, sums_block_pixels
from sdtpu_worker.models.kernel_table import (
    SMALL_TPU,
    TABLE,
    Implementation,
    Shape,
    check_wanted,
    choose,
    dense_block_rows,
    kernel_platform,
    key_block_rows,
)
from sdtpu_worker.models.selection import Selection, current_selection, selecting
from sdtpu_worker.models.vector_memory import vector_memory


@pytest.mark.parametrize(
    ("platform", "shape", "implementation"),
    [
        ("tpu", Shape(4096, 4096, 8, 40, "bfloat16"), "packed"),  # Stable Diffusion 1.x at 512 x 512, the top level
        ("tpu", Shape(4096, 77, 8, 40, "bfloat16"), "packed"),
        ("tpu", Shape(1024, 1024, 8, 80, "bfloat16"), "packed"),
        ("tpu", Shape(9216, 9216, 5, 64, "bfloat16"), "packed"),  # 2.x at 768 x 768
        ("tpu", Shape(256, 256, 8, 160, "bfloat16"), "plain"),
        ("tpu", Shape(4096, 4096, 1, 512, "bfloat16"), "plain"),  # the autoencoder
        ("tpu", Shape(4096, 4096, 8, 40, "float32"), "plain"),
        (SMALL_TPU, Shape(4096, 4096, 8, 40, "bfloat16"), "plain"),
        ("gpu", Shape(4096, 4096, 8, 40, "bfloat16"), "cudnn"),
        ("gpu", Shape(4096, 4096, 8, 40, "float32"), "plain"),
        ("cpu", Shape(4096, 4096, 8, 40, "bfloat16"), "plain"),
    ],
)  # fmt: skip
def test_the_table_chooses(platform, shape, implementation):
    assert choose(platform, "auto", shape).implementation == implementation
    assert choose(platform, "plain", shape).implementation == "plain"
    assert choose(platform, implementation, shape).implementation == implementation


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v4", SMALL_TPU), ("TPU v3", SMALL_TPU), ("TPU v5 lite", "tpu"), ("TPU v5", "tpu"), ("TPU v6 lite", "tpu"),
     ("TPU7x", "tpu")],
)  # fmt: skip
def test_a_tpu_before_the_v5_has_no_kernels_since_its_vector_memory_does_not_hold_them(kind, name):
    assert kernel_platform("tpu", kind) == name
    assert Selection(name).is_tpu
    image = (2, 64, 64, 320)
    found = [
        dense_block_rows(name, "auto", 4096, 320, jnp.bfloat16),
        key_block_rows(name, "auto", (2, 4096, 320), jnp.bfloat16),
        convolution_block(name, "auto", image, 320, False, jnp.bfloat16),
        sums_block_pixels(name, "auto", (8, *image[1:]), jnp.bfloat16),
        projection_block_pixels(name, "auto", image, jnp.bfloat16),
    ]
    assert all(found) if name == "tpu" else not any(found)


def test_the_table_has_a_row_for_everything_and_a_reason_for_every_row():
    assert TABLE[-1].fits("a platform of the future", Shape(1, 1, 1, 1, "float8"))
    assert all(row.reason for row in TABLE)
    assert all(row.block_queries % 16 == 0 for row in TABLE)
    assert all(bool(row.block_queries) == (row.implementation is Implementation.PACKED) for row in TABLE)


@pytest.mark.parametrize(
    ("platform", "wanted", "allowed"),
    [("cpu", "packed", "auto, plain"), ("cpu", "cudnn", "auto, plain"), ("tpu", "cudnn", "auto, plain, packed"),
     (SMALL_TPU, "packed", "auto, plain")],
)  # fmt: skip
def test_an_attention_that_the_platform_has_not_is_refused(platform, wanted, allowed):
    with pytest.raises(
        ConfigurationError, match=f"sdtpu_attention must be one of {allowed} on the platform {platform}"
    ):
        check_wanted(platform, wanted)


def test_a_tick_says_once_what_its_attentions_are(shipped, caplog):
    mesh = make_mesh(jax.local_devices()[:1])
    geometry = Geometry.of(shipped.family, 1, 1, shipped.family.default_size)
    with caplog.at_level(logging.INFO, "sdtpu_worker"):
        lower_tick(shipped.family, put(shipped.params, mesh, REPLICATED), geometry, mesh)
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert len(set(said)) == len(said)
    assert all(line.startswith("attention of ") and ": plain (" in line for line in said)


def test_a_fingerprint_knows_the_setting(shipped):
    lane = shipped.family.default_size
    geometry = Geometry.of(shipped.family, 1, 1, lane)
    prints = {fingerprint_of(shipped, lane, replace(geometry, attention=wanted), "cpu") for wanted in ("auto", "plain")}
    assert len(prints) == 2


def test_a_choice_counts_inside_its_with_and_nowhere_else():
    with selecting(Selection("tpu")) as selection:
        assert current_selection() is selection
    assert current_selection().choose(Shape(4096, 4096, 8, 40, "bfloat16")).implementation == "plain"
    assert not selection.chosen


@pytest.mark.parametrize(
    ("platform", "wanted", "tokens", "features", "dtype", "is_kernel"),
    [
        ("tpu", "auto", 4096, 320, jnp.bfloat16, True),
        ("tpu", "auto", 1024, 640, jnp.bfloat16, False),
        ("tpu", "auto", 4096, 320, jnp.float32, False),
        ("tpu", "plain", 4096, 320, jnp.bfloat16, False),
        ("cpu", "auto", 4096, 320, jnp.bfloat16, False),
    ],
)
def test_the_table_knows_where_dense_layers_are_one_kernel(platform, wanted, tokens, features, dtype, is_kernel):
    assert bool(dense_block_rows(platform, wanted, tokens, features, dtype)) == is_kernel


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((8, 4096, 320), 256), ((2, 4096, 320), 256), ((8, 1024, 640), 256), ((8, 256, 1280), 0), ((9, 1240, 320), 0)],
)
def test_the_table_knows_where_keys_and_values_are_a_kernel(shape, rows):
    assert key_block_rows("tpu", "auto", shape, jnp.bfloat16) == rows
    assert key_block_rows("tpu", "plain", shape, jnp.bfloat16) == 0
    assert key_block_rows("cpu", "auto", shape, jnp.bfloat16) == 0


def test_a_kernel_asks_for_the_vector_memory_that_it_needs():
    mebibytes = 2**20
    assert vector_memory([((16, 128), jnp.bfloat16)], 16 * 128) == 16 * mebibytes  # as much as without asking
    # Two of each block, since the next one is fetched meanwhile, and three scores in flight at ten bytes a number.
    assert vector_memory([((4096, 768), jnp.bfloat16)], 256 * 4096) == 2 * 6 * mebibytes + 30 * mebibytes
    assert vector_memory([((4096, 768), jnp.bfloat16)], 2**30) == 100 * mebibytes
