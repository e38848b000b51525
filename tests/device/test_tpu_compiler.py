"""The TPU's own compiler takes every kernel in the sizes of real models, for the chips that they are meant for."""

from __future__ import annotations

import pytest

from tests.device.tpu_compiler import compile_layers

BLOCK = {"layer": "block", "tokens": 4096, "features": 320, "heads": 8, "prompt": 768}
ATTENTIONS = {
    "Stable Diffusion 1.x at 512 x 512, 1,024 pixels": {"tokens": 1024, "features": 640, "heads": 8},
    "Stable Diffusion XL at 832 x 1216, 988 pixels": {"tokens": 988, "features": 1280, "heads": 20},
    "the same, to the prompt": {"tokens": 988, "features": 1280, "heads": 20, "prompt": 2048},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_the_compiler_takes_attentions_without_a_transposition(topology):
    found = compile_layers([{"layer": "attention", "topology": topology, **sizes} for sizes in ATTENTIONS.values()])
    for name, of_layer in zip(ATTENTIONS, found, strict=True):
        assert of_layer == {"kernels": ["packed_attention"], "transposes": 0}, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiler_makes_three_kernels_of_a_block_of_the_largest_image():
    (found,) = compile_layers([{"topology": "v5e:2x4", **BLOCK}])
    assert found["kernels"] == ["fused_attention", "fused_attention", "gated_feed_forward"]
    assert found["transposes"] == 0
