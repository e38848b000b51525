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
        assert (of_layer["kernels"], of_layer["transposes"]) == (["packed_attention"], 0), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiler_makes_four_kernels_of_a_block_of_the_largest_image():
    (found,) = compile_layers([{"topology": "v5e:2x4", **BLOCK}])
    assert sorted(found["kernels"]) == ["fused_attention", "fused_attention", "gated_feed_forward", "projection"]
    assert (found["transposes"], found["prompt_products"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_v4_whose_vector_memory_holds_no_kernel_gets_layers_that_its_compiler_takes():
    layers = [BLOCK, {"layer": "up_block", "tokens": 64 * 64, "features": 256}]
    for found in compile_layers([{"topology": "v4:2x2x1", **layer} for layer in layers]):
        assert found["kernels"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_with_room_for_long_prompts_no_conditional_and_no_product_of_prompts_is_in_a_step(topology):
    blocks = [
        {"tokens": 1024, "features": 640, "heads": 8, "prompt": 768},
        {"tokens": 256, "features": 640, "heads": 8, "prompt": 768},
        {"tokens": 988, "features": 1280, "heads": 20, "prompt": 2048},
    ]
    found = compile_layers([{"layer": "block", "topology": topology, "windows": 3, **block} for block in blocks])
    for of_block in found:
        assert (of_block["conditionals"], of_block["prompt_products"]) == (0, 0)
    kernels = [set(of_block["kernels"]) for of_block in found]
    assert kernels[0] >= {"fused_attention_of_windows"}
    assert kernels[1] == set()
    assert kernels[2] == {"packed_attention", "packed_attention_of_windows"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_the_compiler_makes_kernels_of_a_decoders_convolutions_and_leaves_none(topology):
    (found,) = compile_layers([{"layer": "up_block", "topology": topology, "tokens": 256 * 256, "features": 256}])
    assert sorted(found.pop("kernels")) == ["convolution"] * 4 + ["doubling_convolution"]
    assert (found["transposes"], found["convolutions"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_the_compiler_copies_no_image_between_convolutions_and_a_transformer(topology):
    (found,) = compile_layers([{"layer": "transformer", "topology": topology, "tokens": 1024, "features": 128}])
    assert sorted(found["kernels"]) == ["channel_sums", "projection_from_image", "projection_to_image"]
    assert (found["transposes"], found["copies"], found["convolutions"]) == (0, 0, 2)
