"""The TPU's kernel of convolutions, in the interpreter: it gives what the layers give, and so do models with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.models import configs, networks
from sdtpu_worker.models.convolution_kernel import Block, convolve
from sdtpu_worker.models.image_kernel_table import convolution_block
from sdtpu_worker.models.kernel_table import TABLE
from sdtpu_worker.models.layers import GroupNorm, channel_sums, resize_nearest
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.selection import Selection, selecting
from tests.device.test_kernels import draw
from tests.device.test_models import TOLERANCE, draw_params, error, golden
from tests.support import model_variants as variants

FAST = {"xla_backend_optimization_level": 0}  # of programs that run once


def plain(x, weight, bias, norm=None, activation=None, shortcut=None, doubles=False):
    """Return what the kernel stands for, by XLA's convolution in float32."""
    y = x.astype(jnp.float32)
    if norm is not None:
        y = y * norm[0][:, None, None] + norm[1][:, None, None]
    y = y if activation is None else activation(y)
    y = resize_nearest(y, 2 * x.shape[1], 2 * x.shape[2]) if doubles else y
    y = jax.lax.conv_general_dilated(
        y, weight.astype(jnp.float32), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = y + bias[:, None, None]
    if isinstance(shortcut, tuple):
        return y + shortcut[0] @ shortcut[1]
    return y if shortcut is None else y + shortcut


def operands(batch: int, height: int, width: int, channels: int, features: int, dtype=jnp.float32):
    weight = draw(1, 3, 3, channels, features, dtype=dtype) * (9 * channels) ** -0.5
    return draw(0, batch, height, width, channels, dtype=dtype), weight.astype(dtype), draw(2, batch, features)


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("block", [Block(8, 24), Block(2, 12), Block(1, 24)])
def test_the_kernel_gives_what_the_convolution_gives(block, doubles):
    x, weight, bias = operands(2, 8, 6, 12, 24)
    got, sums = convolve(x, weight, bias, block, doubles=doubles, interpret=True)
    wanted = plain(x, weight, bias, doubles=doubles)
    assert error(got, np.asarray(wanted)) < 1e-6
    assert error(sums, np.asarray(channel_sums(wanted))) < 1e-6


@pytest.mark.parametrize("shortcut", ["none", "image", "product"])
def test_the_kernel_does_what_stands_around_a_convolution(shortcut):
    x, weight, bias = operands(2, 4, 6, 12, 24)
    norm = 1 + 0.1 * draw(3, 2, 12), draw(4, 2, 12)
    beside = {
        "none": None,
        "image": draw(5, 2, 4, 6, 24),
        "product": (draw(5, 2, 4, 6, 20), draw(6, 20, 24)),
    }[shortcut]
    around = {"norm": norm, "activation": jax.nn.silu, "shortcut": beside}
    got, sums = convolve(x, weight, bias, Block(2, 12), **around, interpret=True)
    wanted = plain(x, weight, bias, **around)
    assert error(got, np.asarray(wanted)) < 1e-6
    assert error(sums, np.asarray(channel_sums(wanted))) < 1e-6


@pytest.mark.parametrize("doubles", [False, True])
def test_the_kernel_gives_in_bfloat16_what_the_convolution_gives_within_its_rounding(doubles):
    x, weight, bias = operands(1, 4, 16, 12, 24, jnp.bfloat16)
    got, _ = convolve(x, weight, bias, Block(2, 24), doubles=doubles, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert error(got.astype(jnp.float32), np.asarray(plain(x, weight, bias, doubles=doubles))) < 2**-6


def test_a_row_has_the_same_result_at_every_place_of_the_batch():
    x, weight, bias = operands(3, 4, 16, 12, 24, jnp.bfloat16)
    together = convolve(x, weight, bias, Block(2, 24), interpret=True)
    turned = convolve(jnp.roll(x, 1, axis=0), weight, jnp.roll(bias, 1, axis=0), Block(2, 24), interpret=True)
    for one, other in zip(together, turned, strict=True):
        assert (jnp.roll(one, 1, axis=0) == other).all()


@pytest.mark.parametrize("block", [Block(3, 24), Block(4, 16)])
def test_a_block_that_does_not_divide_is_an_error_and_not_silence(block):
    x, weight, bias = operands(1, 8, 6, 12, 24)
    with pytest.raises(ValueError, match="must divide 8 rows and 24 features"):
        convolve(x, weight, bias, block, interpret=True)


def with_kernels() -> Selection:
    """Return a selection of the kernel for every convolution that asks, in the interpreter, and of nothing else."""

    def block(platform, wanted, shape, features, doubles, dtype):
        return (shape[1] // 2 if shape[1] % 2 == 0 else shape[1]), features

    return Selection("tpu", interpret=True, table=TABLE[-1:], convolution_block=block)


def run(network, *inputs, **named):
    """Run a network with kernels; the number of them, and what it gives."""
    params = draw_params(network)
    with selecting(with_kernels()):
        lowered = jax.jit(lambda params: network(params, *inputs, **named)).trace(params)
    return str(lowered.jaxpr).count("pallas_call["), lowered.lower().compile(FAST)(params)


@pytest.mark.parametrize("name", ["vae", "vae-without-attention"])
def test_an_autoencoder_with_kernels_gives_what_pytorchs_gives(name):
    config = configs.read_autoencoder_config(variants.VAES[name])
    inputs, wanted = variants.vae_inputs(name), golden("vae")
    count, image = run(networks.decoder(config), inputs["latents"])
    assert count > 10
    assert error(image, wanted[f"{name}/image"]) < TOLERANCE
    count, moments = run(networks.encoder(config), inputs["image"])
    assert count >= 9
    assert error(moments.mean, wanted[f"{name}/mean"]) < TOLERANCE
    assert error(moments.logvar, wanted[f"{name}/logvar"]) < TOLERANCE


@pytest.mark.parametrize("name", ["sd1", "scale-shift", "sd1-odd-sizes"])
def test_a_unet_with_kernels_gives_what_pytorchs_gives(name):
    network = networks.unet(configs.read_unet_config(variants.UNETS[name]))
    inputs = {key: jnp.asarray(value) for key, value in variants.unet_inputs(name).items()}
    count, got = run(network, **inputs)
    assert count > 8
    assert error(got, golden("unet")[name]) < TOLERANCE


def test_sums_give_the_norm_that_two_looks_at_the_image_give():
    network = Network(lambda: GroupNorm(4, 24, 1e-5))
    params = {"weight": 1 + 0.1 * draw(0, 24), "bias": draw(1, 24)}
    x = draw(2, 2, 5, 7, 24) + 8 * draw(3, 24)  # channels with means of their own
    scale, shift = network(params, channel_sums(x), 5 * 7, method="scale_and_shift")
    got = x * scale[:, None, None] + shift[:, None, None]
    assert error(got, np.asarray(network(params, x))) < 1e-5


@pytest.mark.parametrize(
    ("platform", "shape", "features", "doubles", "dtype", "block"),
    [
        ("tpu", (1, 64, 64, 512), 512, False, jnp.bfloat16, (8, 512)),
        ("tpu", (1, 512, 512, 128), 128, False, jnp.bfloat16, (8, 128)),
        ("tpu", (1, 512, 512, 128), 3, False, jnp.bfloat16, (8, 3)),
        ("tpu", (1, 128, 128, 512), 512, True, jnp.bfloat16, (2, 512)),
        ("tpu", (2, 16, 16, 2560), 1280, False, jnp.bfloat16, (16, 256)),
        ("tpu", (8, 16, 16, 1280), 1280, True, jnp.bfloat16, (16, 256)),
        ("tpu", (16, 48, 48, 640), 640, True, jnp.bfloat16, (4, 640)),
        ("tpu", (4, 128, 128, 320), 320, False, jnp.bfloat16, (8, 320)),
        ("tpu", (7, 32, 32, 1280), 1280, False, jnp.bfloat16, (4, 640)),
        ("tpu", (8, 64, 64, 320), 320, False, jnp.bfloat16, None),  # many rows of the batch fill the sublanes
        ("tpu", (1, 64, 64, 4), 512, False, jnp.bfloat16, None),  # an image of few channels
        ("tpu", (1, 64, 72, 512), 512, False, jnp.bfloat16, None),  # rows that do not fill tiles
        ("tpu", (1, 64, 64, 512), 512, False, jnp.float32, None),
        ("cpu", (1, 64, 64, 512), 512, False, jnp.bfloat16, None),
    ],
)
def test_the_table_knows_where_a_convolution_is_a_kernel(platform, shape, features, doubles, dtype, block):
    assert convolution_block(platform, "auto", shape, features, doubles, dtype) == block
    assert convolution_block(platform, "plain", shape, features, doubles, dtype) is None
