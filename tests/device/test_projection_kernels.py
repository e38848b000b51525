"""The TPU's kernels of sums and of projections at the borders of transformers, in the interpreter."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.convolution import Measured, measure
from sdtpu_worker.models.image_kernel_table import projection_block_pixels, sums_block_pixels
from sdtpu_worker.models.kernel_table import TABLE
from sdtpu_worker.models.layers import GroupNorm, LayerNorm, channel_sums
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.projection_kernel import (
    normalise_and_project,
    project_from_image,
    project_to_image,
    turn_image,
)
from sdtpu_worker.models.row_projection_kernel import project_rows_from_image, project_rows_to_image
from sdtpu_worker.models.selection import Selection, selecting
from sdtpu_worker.models.sums_kernel import sum_channels
from sdtpu_worker.models.transformer import SpatialTransformer
from tests.device.test_convolution_kernel import FAST
from tests.device.test_kernels import draw
from tests.device.test_models import TOLERANCE, draw_params, error, golden
from tests.support import model_variants as variants


def with_kernels() -> Selection:
    """Return a selection of these kernels alone, in the interpreter, for every image whose pixels they can take."""

    def block(platform, wanted, shape, dtype):
        pixels = shape[1] * shape[2]
        return pixels // 2 if pixels % 32 == 0 else 0

    nothing = Selection("tpu", interpret=True, table=TABLE[-1:], convolution_block=lambda *_: None)
    return replace(nothing, sums_block_pixels=block, projection_block_pixels=block)


@pytest.mark.parametrize(("batch", "block"), [(2, 16), (8, 4), (8, 32), (16, 1)])
def test_the_kernel_gives_the_sums_of_an_image(batch, block):
    x = draw(0, batch, 4, 8, 24) + 3
    assert error(sum_channels(x, block, interpret=True), np.asarray(channel_sums(x))) < 1e-6


def test_the_kernel_adds_up_in_float32_what_is_bfloat16():
    x = draw(0, 8, 16, 16, 24, dtype=jnp.bfloat16) + jnp.bfloat16(3)
    got = sum_channels(x, 64, interpret=True)
    assert got.dtype == jnp.float32
    assert error(got, np.asarray(channel_sums(x))) < 1e-6


@pytest.mark.parametrize(("batch", "project"), [(8, project_from_image), (2, project_rows_from_image)])
def test_a_transformer_is_entered_through_the_norm_of_an_image(batch, project):
    x, scale, shift = draw(0, batch, 4, 8, 24), draw(1, batch, 24), draw(2, batch, 24)
    weight, bias = draw(3, 24, 40), draw(4, 40)
    got = project(x, (scale, shift), weight, bias, 16, interpret=True)
    wanted = ((x * scale[:, None, None] + shift[:, None, None]) @ weight + bias).reshape(batch, 32, 40)
    assert error(got, np.asarray(wanted)) < 1e-6


@pytest.mark.parametrize(("batch", "project"), [(8, project_to_image), (2, project_rows_to_image)])
def test_a_transformer_is_left_with_the_shortcut_and_the_sums_of_the_result(batch, project):
    y, weight, bias, x = draw(0, batch, 32, 40), draw(1, 40, 24), draw(2, 24), draw(3, batch, 4, 8, 24)
    got, sums = project(y, weight, bias, x, 16, interpret=True)
    wanted = x + (y @ weight + bias).reshape(x.shape)
    assert error(got, np.asarray(wanted)) < 1e-6
    assert error(sums, np.asarray(channel_sums(wanted))) < 1e-6


def test_a_turned_image_is_the_image():
    x = draw(0, 8, 4, 8, 24, dtype=jnp.bfloat16)
    assert (turn_image(x, 16, interpret=True) == x).all()
    with pytest.raises(ValueError, match="block_pixels must divide 32 pixels, got 12"):
        turn_image(x, 12, interpret=True)


def test_a_norm_and_the_product_after_it_are_one_kernel():
    network = Network(lambda: LayerNorm(24))
    params = {"weight": 1 + 0.1 * draw(0, 24), "bias": draw(1, 24)}
    x, weight, bias = draw(2, 2, 32, 24) + 5, draw(3, 24, 40), draw(4, 40)
    got = normalise_and_project(
        x, params["weight"], params["bias"], weight, bias, eps=1e-5, block_rows=16, interpret=True
    )
    assert error(got, np.asarray(network(params, x) @ weight + bias)) < 1e-6


@pytest.mark.parametrize(
    ("enter", "leave"), [(project_from_image, project_to_image), (project_rows_from_image, project_rows_to_image)]
)
def test_a_row_has_the_same_result_at_every_place_of_the_batch(enter, leave):
    x, y = draw(0, 8, 4, 8, 24, dtype=jnp.bfloat16), draw(1, 8, 32, 24, dtype=jnp.bfloat16)
    weight, bias = draw(2, 24, 24, dtype=jnp.bfloat16), draw(3, 24)
    affine = draw(4, 8, 24), draw(5, 8, 24)

    def everything(x, y, affine):
        entered = enter(x, affine, weight, bias, 16, interpret=True)
        return sum_channels(x, 16, interpret=True), entered, *leave(y, weight, bias, x, 16, interpret=True)

    turned = everything(*jax.tree.map(lambda leaf: jnp.roll(leaf, 3, axis=0), (x, y, affine)))
    for one, other in zip(everything(x, y, affine), turned, strict=True):
        assert (jnp.roll(one, 3, axis=0) == other).all()


def test_a_block_that_does_not_divide_is_an_error_and_not_silence():
    x, y, weight, bias = draw(0, 8, 4, 8, 24), draw(1, 8, 32, 24), draw(2, 24, 24), draw(3, 24)
    with pytest.raises(ValueError, match="block_pixels must divide 32 pixels"):
        sum_channels(x, 12, interpret=True)
    with pytest.raises(ValueError, match="a multiple of 2, got 1"):
        sum_channels(x, 1, interpret=True)
    for leave in (project_to_image, project_rows_to_image):
        with pytest.raises(ValueError, match="block_pixels must divide 32 pixels, got 12"):
            leave(y, weight, bias, x, 12, interpret=True)
    for enter in (project_from_image, project_rows_from_image):
        with pytest.raises(ValueError, match="block_pixels must divide 32 pixels, got 12"):
            enter(x, (bias[None], bias[None]), weight, bias, 12, interpret=True)
    with pytest.raises(ValueError, match="block_rows must divide 256 rows, got 60"):
        normalise_and_project(y, bias, bias, weight, bias, eps=1e-5, block_rows=60, interpret=True)


class NormOfMeasured(nnx.Module):
    """A norm of images that know their sums."""

    def __init__(self, channels: int) -> None:
        self.norm = GroupNorm(4, channels, 1e-5)

    def __call__(self, x):
        return x.normalised(self.norm)


def test_images_beside_each_other_keep_the_sums_that_both_have():
    params = {"norm.weight": 1 + 0.1 * draw(0, 48), "norm.bias": draw(1, 48)}
    one, other = draw(2, 8, 4, 8, 16), 5 + draw(3, 8, 4, 8, 32)
    with selecting(with_kernels()):
        both = measure(one).beside(measure(other))
        got = Network(lambda: NormOfMeasured(48))(params, both)
        assert measure(one).beside(Measured(other)).sums is None
    assert error(both.sums, np.asarray(channel_sums(both.image))) < 1e-6
    wanted = Network(lambda: NormOfMeasured(48))(params, Measured(jnp.concatenate([one, other], axis=-1)))
    assert error(got, np.asarray(wanted)) < 1e-5


@pytest.mark.parametrize(("batch", "counts"), [(8, True), (2, False)])
def test_sums_count_where_there_is_a_kernel_for_them(batch, counts):
    """Of few rows, the sums that a kernel of convolutions left are not read."""
    network = Network(lambda: NormOfMeasured(128))
    params = {"norm.weight": 1 + 0.1 * draw(0, 128), "norm.bias": draw(1, 128)}
    x = draw(2, batch, 8, 8, 128, dtype=jnp.bfloat16)
    with selecting(Selection("tpu", interpret=True)):
        right, wrong = (network(params, Measured(x, sums)) for sums in (channel_sums(x), 4 * channel_sums(x)))
    assert (right != wrong).any() == counts


@pytest.mark.parametrize(
    ("lora", "kernels"),
    [
        ("", ["channel_sums", "projection_from_image", "projection_to_image"]),
        ("proj_in.weight", ["channel_sums", "projection_to_image"]),
        ("proj_out.weight", ["channel_sums", "projection_from_image"]),
    ],
)
def test_a_projection_with_a_lora_is_a_layer_as_everywhere(lora, kernels):
    network = Network(lambda: SpatialTransformer(24, 12, 2, 0, 4, False, False))
    params = {name: draw(seed, *shape) * 24**-0.5 for seed, (name, shape) in enumerate(network.shapes.items())}
    loras = {lora: (draw(20, 8, 24, 4) * 0.1, draw(21, 8, 4, 24))} if lora else {}
    x = draw(9, 8, 4, 8, 24)

    def run(x, loras):
        return network(params, measure(x), x, adapters=loras).image

    wanted = jax.jit(run)(x, loras)
    with selecting(with_kernels()):
        traced = jax.jit(lambda *arguments: run(*arguments)).trace(x, loras)
    used = set(re.findall("name=(channel_sums|projection\\w*)", str(traced.jaxpr)))
    assert sorted(used) == kernels
    assert error(traced.lower().compile()(x, loras), np.asarray(wanted)) < 1e-5


PROJECTIONS = {"projection_from_image", "projection_to_image"}
ROW_PROJECTIONS = {f"row_{name}" for name in PROJECTIONS}


@pytest.mark.parametrize(
    ("name", "times", "projections"),
    [
        ("sd1", 4, PROJECTIONS), ("sd1", 1, ROW_PROJECTIONS), ("sd2", 4, PROJECTIONS), ("sd2", 1, ROW_PROJECTIONS),
        ("scale-shift", 1, set()),
    ],
)  # fmt: skip
def test_a_unet_with_these_kernels_gives_what_pytorchs_gives(name, times, projections):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    inputs = {
        key: jnp.asarray(np.concatenate([value] * times)) for key, value in variants.unet_inputs(name).items()
    }  # fmt: skip
    params = draw_params(network)
    with selecting(with_kernels()):
        lowered = jax.jit(lambda params: network(params, **inputs)).trace(params)
    used = set(re.findall("name=(channel_sums|\\w*projection\\w*)", str(lowered.jaxpr)))
    assert used == {"channel_sums"} | projections
    wanted = np.concatenate([golden("unet")[name]] * times)
    assert error(lowered.lower().compile(FAST)(params), wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "sums", "projection"),
    [
        ("tpu", (8, 64, 64, 320), jnp.bfloat16, 128, 64),
        ("tpu", (8, 32, 32, 640), jnp.bfloat16, 64, 32),
        ("tpu", (8, 16, 16, 1280), jnp.bfloat16, 32, 0),
        ("tpu", (16, 96, 96, 320), jnp.bfloat16, 72, 32),
        ("tpu", (8, 8, 8, 1280), jnp.bfloat16, 32, 0),
        ("tpu", (8, 4, 4, 1280), jnp.bfloat16, 0, 0),  # few pixels
        ("tpu", (2, 64, 64, 320), jnp.bfloat16, 0, 512),  # convolutions are kernels there, which have their sums
        ("tpu", (1, 32, 32, 640), jnp.bfloat16, 0, 256),
        ("tpu", (2, 16, 16, 1280), jnp.bfloat16, 0, 0),
        ("tpu", (4, 64, 64, 640), jnp.bfloat16, 0, 256),
        ("tpu", (6, 64, 64, 320), jnp.bfloat16, 0, 512),
        ("tpu", (12, 64, 64, 320), jnp.bfloat16, 0, 0),  # rows that do not fill the sublanes
        ("tpu", (8, 64, 64, 320), jnp.float32, 0, 0),
        ("cpu", (8, 64, 64, 320), jnp.bfloat16, 0, 0),
    ],
)
def test_the_table_knows_where_sums_and_projections_are_kernels(platform, shape, dtype, sums, projection):
    assert sums_block_pixels(platform, "auto", shape, dtype) == sums
    assert projection_block_pixels(platform, "auto", shape, dtype) == projection
    assert sums_block_pixels(platform, "plain", shape, dtype) == 0
    assert projection_block_pixels(platform, "plain", shape, dtype) == 0
